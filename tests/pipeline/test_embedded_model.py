"""The embedded model, built as a user builds it: all planned layers INT8 in the engine, pictures worth shipping."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from qdm_deploy.artifacts.bundle import Bundle
from qdm_deploy.artifacts.phase_sums import PHASES, fits_phases, phase_sums
from qdm_deploy.artifacts.plan import TARGETS, QuantizationPlan
from qdm_deploy.pipeline import BuildOptions, BuildResult, build, build_engine, verify

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> BuildResult:
    """16 pictures of 20 DDIM steps, the default engine, and whatever speed this machine has left."""
    folder = tmp_path_factory.mktemp("embedded")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QDM_CACHE_DIR", str(folder / "cache"))
        return build(BuildOptions(out=folder / "fashion.qdm", verify_samples=16, verify_steps=20, min_speedup=0.0))


def test_it_ships(embedded: BuildResult) -> None:
    assert embedded.report.verdict.ship, embedded.report.verdict.problems


def test_every_planned_layer_is_int8_in_the_engine(embedded: BuildResult) -> None:
    pytest.importorskip("tensorrt_rtx")
    (engine,) = embedded.report.engines
    assert (engine.backend, engine.sm) == ("tensorrt-rtx", "8.9")
    assert engine.failures == ()
    assert engine.int8 == engine.planned == embedded.report.plan_summary["int8"]
    assert engine.planned > 50


def test_the_pictures_are_those_of_the_float_model(embedded: BuildResult) -> None:
    rows = {row.target: row for row in embedded.report.quality}
    simulated = rows["tensorrt"]
    assert (simulated.backend, simulated.sampler, simulated.steps, simulated.samples) == ("simulation", "ddim", 20, 16)
    assert simulated.eps_sqnr_mean_db >= 42
    assert simulated.psnr_mean_db is not None
    assert simulated.psnr_mean_db >= 42
    for row in rows.values():
        assert row.psnr_mean_db is not None
        assert min(row.psnr_mean_db, row.eps_sqnr_mean_db) >= 30


def test_the_weight_codes_of_all_graphs_are_those_of_the_plan(embedded: BuildResult) -> None:
    bundle = Bundle.open(embedded.bundle)
    plan = QuantizationPlan.load(bundle.file("unet/plan.json").parent)
    for target in TARGETS:
        graph = onnx.load(str(bundle.graph(target))).graph
        values = {tensor.name: tensor for tensor in graph.initializer}
        for item in plan.quantized:
            if fits_phases(item) and target != "tensorrt":
                parts = [onnx.numpy_helper.to_array(values[f"{item.name}/phase_{n}/weight_codes"]) for n in range(4)]
                assert all(
                    np.array_equal(*pair)
                    for pair in zip(parts, [phase_sums(item.codes, p) for p in PHASES], strict=True)
                )
                continue
            codes = onnx.numpy_helper.to_array(values[f"{item.name}/weight_codes"])
            # A matrix product may read its weight as [inputs, outputs].
            readings = [item.codes] if item.layer.kind == "conv" else [item.codes, item.codes.T]
            assert any(np.array_equal(codes, reading) for reading in readings), f"{item.name} in {target}"


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_it_verifies(embedded: BuildResult, backend: str) -> None:
    pytest.importorskip(backend)
    assert verify(embedded.bundle, backend).ok


def test_the_engine_of_a_bundle_is_found_in_the_cache(embedded: BuildResult, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setenv("QDM_CACHE_DIR", str(embedded.bundle.parent / "cache"))
    result = build_engine(embedded.bundle, sm="8.9")
    assert result.from_cache
    assert result.row.kernels == embedded.report.engines[0].kernels
    assert Path(result.path).is_file()
