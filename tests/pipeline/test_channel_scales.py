"""``channel_scales="free"``: factors only where no target pays for them."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from qdm_deploy.building.options import BuildOptions
from qdm_deploy.building.planning import planned
from qdm_export.targets import emit


def nobody_asks() -> Any:
    raise AssertionError("one step bin needs no step importance")


def test_free_factors_leave_no_multiply_where_it_would_cost_a_kernel(tiny: Any, tmp_path: Path) -> None:
    topology = tiny.topology("labels")
    counts = {}
    for mode in ("free", "auto"):
        options = BuildOptions(
            out=tmp_path / "bundle",
            channel_scales=mode,
            ranges="minmax",
            step_bins=1,
            keep_fp="none",
            sensitivity=False,
        )
        plan = planned(
            options, tiny.checkpoint("labels"), topology, tiny.calibration("labels"), tiny.statistics("labels"),
            importance=nobody_asks, stage=lambda name: nullcontext(),
        ).plan  # fmt: skip
        for target in options.targets:
            graph = emit(tiny.float_graph("labels"), plan, target).model
            left = [str(node.name).rpartition("/")[0] for node in graph.graph
                    if str(node.name).endswith("/scale_channels")]  # fmt: skip
            counts[mode, target] = [name for name in left if topology.layer(name).normalized]
        assert any(item.inverse_k is not None for item in plan.quantized)
    assert {target: counts["free", target] for target in ("onnxruntime", "openvino", "tensorrt")} == {
        "onnxruntime": [], "openvino": [], "tensorrt": []
    }  # fmt: skip
    assert counts["auto", "tensorrt"]
