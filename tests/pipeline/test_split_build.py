"""``concat_scales="split"``: the parts are planned, emitted and checked like any layer."""

from pathlib import Path
from typing import Any

import pytest

from qdm_calibration.plan import PlanOptions, make_plan
from qdm_calibration.statistics import collect_statistics
from qdm_deploy.artifacts.plan import TARGETS
from qdm_deploy.building.checks import check_integer_kernels, check_layers, run_graph
from qdm_deploy.samplers.random_inputs import random_inputs
from qdm_export.float_graph import save_graph
from qdm_export.split_concat import concat_readers, split_checkpoint
from qdm_export.targets import emit
from qdm_export.topology import topology_of

NAMES = ("labels", "rgb", "text", "variance")
_split: dict[str, Any] = {}


def split(tiny: Any, name: str) -> Any:
    """Checkpoint, graph and plan of a tiny model in the split form, with gains wherever a range moves at all."""
    if name not in _split:
        checkpoint, graph = split_checkpoint(tiny.checkpoint(name), tiny.float_graph(name))
        statistics = collect_statistics(checkpoint.unet, topology_of(graph), tiny.calibration(name), 1000)
        options = PlanOptions(ranges="minmax", concat_scales="split", gain_ratio=1.02, step_bins=3)
        _split[name] = checkpoint, graph, make_plan(checkpoint.unet, topology_of(graph), statistics, options)
    return _split[name]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("target", TARGETS)
def test_the_parts_compute_the_planned_integers(tiny: Any, tmp_path: Path, target: Any, name: str) -> None:
    checkpoint, graph, plan = split(tiny, name)
    row = check_layers(checkpoint, plan, target, graph, random_inputs(checkpoint.denoiser, 3), tmp_path)
    assert row.ok, row
    assert row.detail.startswith(f"{len(plan.quantized)} of {len(plan.quantized)} layers match")


@pytest.mark.parametrize("name", NAMES)
def test_each_part_is_an_integer_kernel(tiny: Any, tmp_path: Path, name: str) -> None:
    checkpoint, graph, plan = split(tiny, name)
    save_graph(emit(graph, plan, "onnxruntime").model, tmp_path / "int8.onnx")
    run_graph(
        "onnxruntime", tmp_path / "int8.onnx", random_inputs(checkpoint.denoiser, 2), optimized=tmp_path / "optimized"
    )
    row = check_integer_kernels(plan, tmp_path / "optimized")
    assert row.ok, row
    more = sum(len(widths) - 1 for widths in concat_readers(tiny.float_graph(name)).split.values())
    assert len(plan.quantized) == len(tiny.plan(name).quantized) + more


def test_each_part_has_scales_of_its_own_and_no_factor(tiny: Any) -> None:
    _, _, plan = split(tiny, "labels")
    for name in concat_readers(tiny.float_graph("labels")).split:
        first, second = (plan.layer(f"{name}.branches.{index}") for index in (0, 1))
        assert first.scale != second.scale
        assert (first.weight_scales != second.weight_scales).mean() > 0.5  # each from its own columns
    assert all(layer.inverse_k is None for layer in plan.quantized)
    gains = [layer.name for layer in plan.quantized if layer.inverse_r is not None and ".branches." in layer.name]
    assert gains  # a part may have gains, and its bias then comes behind them
    whole = [layer for layer in plan.quantized if layer.layer.reads_concat]
    assert whole
    assert {layer.notes["k"] for layer in whole} == {
        "one scale for the skip branches: only what reads the concatenation itself is split"
    }
