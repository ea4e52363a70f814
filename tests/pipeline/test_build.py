"""A checkpoint becomes a bundle that opens, passes its own checks and says what it is worth."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from qdm_deploy.artifacts.bundle import Bundle, check_bundle
from qdm_deploy.artifacts.calibration_set import CalibrationSet
from qdm_deploy.artifacts.plan import TARGETS, QuantizationPlan
from qdm_deploy.errors import BundleError, EnvironmentProblem, InputError
from qdm_deploy.pipeline import BuildOptions, BuildResult, build, inspect
from qdm_deploy.report.model import Report
from qdm_deploy.runtime.cpu import saturates_int8


def test_the_bundle_opens_with_everything_in_it(labels_build: BuildResult) -> None:
    assert check_bundle(labels_build.bundle) == []
    bundle = Bundle.open(labels_build.bundle)
    assert bundle.id == labels_build.bundle_id
    assert {entry.path for entry in bundle.manifest.files} == {
        "model_index.json",
        "report.html",
        "report.json",
        "scheduler/scheduler_config.json",
        "selftest/expected.safetensors",
        "selftest/inputs.safetensors",
        "unet/float.data",
        "unet/float.onnx",
        "unet/onnxruntime.onnx",
        "unet/openvino.onnx",
        "unet/plan.json",
        "unet/plan.safetensors",
        "unet/tensorrt.onnx",
        "unet/weights.bin",
    }
    assert bundle.manifest.targets == TARGETS
    assert bundle.pipeline.encoder.labels == ("shirt", "bag", "boot")
    assert bundle.pipeline.encoder.null_label == 3


def test_a_guided_calibration_holds_the_unconditional_twin_of_every_row(labels_build: BuildResult) -> None:
    inspection = inspect(labels_build.bundle)
    calibration = CalibrationSet.load(labels_build.bundle.parent / "calibration")
    assert calibration.provenance["guidance"] == 1.5
    # 4 trajectories at 8 steps, each row with its twin.
    assert len(calibration) == inspection.plan.provenance["statistics"]["rows"] == 4 * 8 * 2
    assert sorted(calibration.conditioning["class_labels"].tolist()) == [0] * 16 + [1] * 8 + [2] * 8 + [3] * 32
    assert inspection.manifest.provenance["calibration"] == calibration.provenance


def test_the_report_is_in_the_bundle(labels_build: BuildResult) -> None:
    report = labels_build.report
    assert Report.from_json((labels_build.bundle / "report.json").read_bytes()) == report
    assert report.command == "a test"
    page = (labels_build.bundle / "report.html").read_text(encoding="utf-8")
    assert ("DO NOT SHIP" in page) != report.verdict.ship
    assert page.count("data:image/png;base64,") >= 1


def test_the_report_measures_every_target(labels_build: BuildResult) -> None:
    report = labels_build.report
    assert [row.target for row in report.quality] == list(TARGETS)
    for row in report.quality:
        assert len(row.timesteps) == row.steps == 4
        assert len(row.psnr_db) == row.samples == 2
        assert row.guidance == 1.5
        # A random network quantizes worse than a trained one; wrong integers would leave a few dB.
        assert row.eps_sqnr_min_db > 18
    assert report.plan_summary["int8"] == report.plan_summary["layers"] - report.plan_summary["float"] > 20
    assert {(row.backend, row.precision) for row in report.speed} >= {("onnxruntime", "int8"), ("onnxruntime", "float")}
    assert set(report.size.int8_bytes) == set(TARGETS)
    assert list(report.stage_seconds)[:4] == ["load", "export", "calibrate", "plan"]


def test_the_integers_are_checked_against_pytorch(labels_build: BuildResult) -> None:
    checks = {check.name: check for check in labels_build.report.checks}
    for target in ("onnxruntime", "openvino", "tensorrt"):
        assert checks[f"{target} graph computes the planned integers"].ok
    assert checks["float graph computes what PyTorch does"].ok
    assert checks["ONNX Runtime runs integer kernels where planned"].ok


def test_the_recipe_names_options_and_no_path(labels_build: BuildResult, rgb_build: BuildResult) -> None:
    recipe = inspect(labels_build.bundle).manifest.recipe
    assert recipe["calibration_samples"] == 4
    assert recipe["model"] == "labels"
    assert inspect(rgb_build.bundle).manifest.recipe["calibration_file"] == "rgb.calibration"
    for path in labels_build.bundle.rglob("*"):
        if path.is_file():
            assert str(labels_build.bundle.parent).encode() not in path.read_bytes(), path


def test_all_targets_hold_the_same_weight_codes_and_share_them(labels: Path) -> None:
    plan = QuantizationPlan.load(labels / "unet")
    places: dict[str, set[tuple[int, int]]] = {}
    for target in TARGETS:
        graph = onnx.load(str(labels / "unet" / f"{target}.onnx"), load_external_data=False).graph
        for tensor in graph.initializer:
            layer, _, kind = tensor.name.rpartition("/")
            if kind == "weight_codes" and tensor.external_data:
                where = {item.key: item.value for item in tensor.external_data}
                assert where["location"] == "weights.bin"
                places.setdefault(layer, set()).add((int(where["offset"]), int(where["length"])))
    weights = (labels / "unet" / "weights.bin").read_bytes()
    large = [item for item in plan.quantized if item.codes.nbytes >= 1024]
    assert len(large) > 10
    for item in large:
        ((offset, length),) = places[item.name]
        stored = Counter(np.frombuffer(weights[offset : offset + length], np.int8).tolist())
        assert stored == Counter(item.codes.ravel().tolist())


def test_a_build_that_falls_short_does_not_ship_and_is_still_a_bundle(rgb_build: BuildResult) -> None:
    verdict = rgb_build.report.verdict
    assert not verdict.ship
    assert any("too low, required: 200.00" in problem for problem in verdict.problems)
    assert any("too low, required: 999.00" in problem for problem in verdict.problems)
    told = [text for text in rgb_build.report.warnings if "saturate" in text]
    assert len(told) == saturates_int8()
    assert check_bundle(rgb_build.bundle) == []


def test_a_bundle_may_leave_targets_and_the_float_graph_out(rgb_build: BuildResult) -> None:
    bundle = Bundle.open(rgb_build.bundle)
    assert bundle.manifest.targets == ("onnxruntime",)
    assert [row.target for row in rgb_build.report.quality] == ["onnxruntime"]
    assert sorted(path.name for path in (rgb_build.bundle / "unet").glob("*.onnx")) == ["onnxruntime.onnx"]
    with pytest.raises(BundleError, match="no graph for 'float'"):
        bundle.graph("float")
    files = [rgb_build.bundle / "unet" / name for name in ("onnxruntime.onnx", "weights.bin")]
    assert rgb_build.report.size.int8_bytes == {"onnxruntime": sum(path.stat().st_size for path in files)}


def test_a_given_calibration_set_is_used_as_it_is(rgb_build: BuildResult, tiny: Any) -> None:
    calibration = tiny.calibration("rgb")
    inspection = inspect(rgb_build.bundle)
    assert inspection.manifest.provenance["calibration"] == calibration.provenance
    assert inspection.plan.provenance["statistics"]["rows"] == len(calibration)


def test_inspection_tells_what_is_inside(labels_build: BuildResult) -> None:
    inspection = inspect(labels_build.bundle)
    assert inspection.bundle_id == labels_build.bundle_id
    assert inspection.plan.summary() == labels_build.report.plan_summary
    first = inspection.plan.layers[0]
    assert (first.name, first.precision) == ("conv_in", "float")
    assert "first convolution" in first.reason


def test_engines_are_refused_before_any_work_where_the_library_cannot_build_them(tmp_path: Path) -> None:
    # There is no such model: had it been looked at, that would be the error.
    options = BuildOptions(out=tmp_path / "x.qdm", model=str(tmp_path / "missing"), engines=("6.1",))
    with pytest.raises(InputError, match=r"cannot build for compute capability '6\.1'; it builds for 7\.5"):
        build(options)
    assert list(tmp_path.iterdir()) == []


def test_engines_are_refused_without_their_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import qdm_deploy.building.bundle_from_checkpoint as module

    found = module.find_spec
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "tensorrt_rtx" else found(name))
    options = BuildOptions(out=tmp_path / "x.qdm", model=str(tmp_path / "missing"), engines=("8.9",))
    with pytest.raises(EnvironmentProblem, match=r"tensorrt_rtx is missing; .*qdm-deploy\[tensorrt-rtx\]"):
        build(options)
    assert list(tmp_path.iterdir()) == []


def test_building_needs_the_build_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import qdm_deploy.building.bundle_from_checkpoint as module

    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(
        EnvironmentProblem, match=r"building needs torch, diffusers, transformers, onnx.*qdm-deploy\[build\]"
    ):
        build(BuildOptions(out=tmp_path / "x.qdm"))
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_refused_before_any_work(tmp_path: Path) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "letter.txt").write_text("dear")
    missing = str(tmp_path / "missing")
    with pytest.raises(InputError, match=r"mine exists: choose another name"):
        build(BuildOptions(out=out, model=missing, engines=()))
    with pytest.raises(InputError, match=r"mine is not a bundle that can be recognised"):
        build(BuildOptions(out=out, model=missing, engines=(), force=True))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert (out / "letter.txt").read_text() == "dear"


def test_a_missing_model_leaves_nothing(tmp_path: Path) -> None:
    from qdm_deploy.errors import ModelError

    with pytest.raises(ModelError, match=r"there is no model folder '.*missing'"):
        build(BuildOptions(out=tmp_path / "x.qdm", model=str(tmp_path / "missing"), engines=()))
    assert list(tmp_path.iterdir()) == []


def test_force_replaces_a_bundle(quick_build: Any, labels: Path, tmp_path: Path) -> None:
    out = tmp_path / "again.qdm"
    shutil.copytree(labels, out)
    result = quick_build(out, "rgb", targets=("onnxruntime",), force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["again.qdm"]
    assert Bundle.open(out).pipeline.name == "rgb"
    assert result.bundle == out


def test_json_files_are_those_of_the_model(labels: Path, tiny: Any) -> None:
    source = tiny.folder("labels")
    for name in ("model_index.json", "scheduler/scheduler_config.json"):
        assert json.loads((labels / name).read_bytes()) == json.loads((source / name).read_bytes())


def test_weights_of_4_bits_are_reconstructed_and_say_so(quick_build: Any, tmp_path: Path) -> None:
    built = quick_build(
        tmp_path / "four.qdm",
        name="variance",
        weight_bits=4,
        reconstruct="full",
        reconstruct_iterations=5,
        output_correction="auto",
        targets=("onnxruntime",),
    )
    plan = QuantizationPlan.load(built.bundle / "unet")
    assert plan.options["reconstruct"] == "full"
    assert plan.options["reconstruct_iterations"] == 5
    assert all("held-out error" in layer.notes["w"] for layer in plan.quantized)
    assert max(int(np.abs(layer.codes).max()) for layer in plan.quantized) <= 7
    assert built.report.stage_seconds["reconstruct"] > 0
    assert plan.options["output_correction"] == "auto"
    assert "output correction" in built.report.stage_seconds
    assert all(check.ok for check in built.report.checks)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["four.qdm"]
