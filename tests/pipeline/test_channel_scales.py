"""``channel_scales="free"``: factors only where no target pays for them."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from qdm_deploy.artifacts.plan import LayerPlan, QuantizationPlan
from qdm_deploy.building import planning
from qdm_deploy.building.options import BuildOptions
from qdm_deploy.building.planning import planned
from qdm_deploy.building.sensitivity import Budgeted
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


LOUD = "down_blocks.0.resnets.0.conv2"


def plan_where(tiny: Any, monkeypatch: pytest.MonkeyPatch, share: float, **options: Any) -> dict[str, LayerPlan]:
    """A plan's layers by name, as if one layer made ``share`` of the noise of the worst timestep."""

    def measured(options: BuildOptions, checkpoint: Any, calibration: Any, plan: QuantizationPlan, *_: Any) -> Budgeted:
        return Budgeted(plan, worst_shares={"mid_block.resnets.0.conv1": 0.1, LOUD: share})

    monkeypatch.setattr(planning, "measured_and_kept", measured)
    checkpoint = tiny.checkpoint("labels")
    given = BuildOptions(out=Path("bundle"), step_bins=1, output_correction="none", **options)
    plan = planned(
        given, checkpoint, tiny.topology("labels"), tiny.calibration("labels"), tiny.statistics("labels"),
        importance=nobody_asks, stage=lambda name: nullcontext(),
    ).plan  # fmt: skip
    return {layer.name: layer for layer in plan.layers}


def test_the_layer_that_makes_most_of_the_worst_noise_gets_factors_too(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet, loud = (plan_where(tiny, monkeypatch, share) for share in (0.4, 0.6))
    changed = {name for name, layer in loud.items() if layer.notes != quiet[name].notes}
    assert changed == {LOUD}
    assert "60% of the noise at the worst timestep" in loud[LOUD].notes["k"]
    assert quiet[LOUD].inverse_k is None
    assert loud[LOUD].inverse_k is not None
    assert loud[LOUD].scale != quiet[LOUD].scale


@pytest.mark.parametrize("options", [{"channel_scales": "none"}, {"bias_correction": "auto"}])
def test_it_gets_none_where_factors_are_off_or_its_weights_were_tuned(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    assert plan_where(tiny, monkeypatch, 0.6, **options)[LOUD].inverse_k is None
