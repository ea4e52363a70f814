"""Layers kept in float by a build: in the plan, in the recipe, and refused before any calibration."""

import re
from pathlib import Path
from typing import Any

import onnx
import pytest

from qdm_deploy.artifacts.bundle import Bundle
from qdm_deploy.artifacts.plan import QuantizationPlan
from qdm_deploy.errors import InputError
from qdm_deploy.runtime.cpu import saturates_int8


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["auto", "10%", "down_blocks.1.resnets.0.conv2"])
def test_a_build_keeps_layers_in_float(quick_build: Any, tmp_path: Path, choice: str) -> None:
    result = quick_build(tmp_path / "kept.qdm", "rgb", keep_fp=choice, min_eps_sqnr_db=200.0)
    plan = QuantizationPlan.load(tmp_path / "kept.qdm" / "unet")
    kept = [item for item in plan.layers if item.reason.startswith("kept in float: ")]
    assert kept
    assert plan.quantized
    assert result.report.recipe["keep_fp"] == choice
    assert "sensitivity" in result.report.stage_seconds
    assert all(check.ok for check in result.report.checks)
    # The openvino graph multiplies the convolutions but shortcuts in bfloat16, and the manifest says what that needs.
    convolutions = [item.name for item in kept if item.layer.weight_shape[2:] not in ((), (1, 1))]
    assert Bundle.open(result.bundle).manifest.compatibility.opset == (22 if convolutions else 21)
    graph = onnx.load(result.bundle / "unet" / "openvino.onnx", load_external_data=False).graph
    casts = [node.name for node in graph.node if node.op_type == "Cast" and node.name.endswith("/bfloat16")]
    assert casts == [f"{name}/bfloat16" for name in convolutions]


@pytest.mark.slow
@pytest.mark.skipif(
    saturates_int8(),
    reason="this CPU's INT8 products saturate; would have shown that a part of a step's time is kept to",
)
def test_a_part_of_the_time_is_kept_to(quick_build: Any, tmp_path: Path) -> None:
    report = quick_build(tmp_path / "kept.qdm", "rgb", keep_fp="20%time").report
    # How many layers that is, the clock decides: none, and a warning, on a machine too busy to time a model this small.
    assert report.noise.kept or any("20%time keeps no layer" in text for text in report.warnings)
    assert report.noise.step_ms <= 1.2 * report.noise.frontier[0].step_ms


@pytest.mark.slow
def test_nothing_left_in_int8_is_told(quick_build: Any, tmp_path: Path) -> None:
    result = quick_build(tmp_path / "kept.qdm", "rgb", keep_fp="*")
    assert not QuantizationPlan.load(tmp_path / "kept.qdm" / "unet").quantized
    assert any(
        re.search(r"--keep-fp \* keeps all \d+ layers in float: nothing", text) for text in result.report.warnings
    )


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("conv_uot", "'conv_uot' is no INT8 layer .*"),
        ("200%", "'200%' of the INT8 cost cannot be kept in float"),
        ("200%time", "'200%time' of a step's time cannot be added by layers in float"),
    ],
)
def test_a_choice_that_cannot_be_kept_is_refused(quick_build: Any, tmp_path: Path, choice: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        quick_build(tmp_path / "kept.qdm", "rgb", keep_fp=choice)
    assert not (tmp_path / "kept.qdm").exists()


def test_a_part_of_the_time_needs_a_backend_that_tells_it(quick_build: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--keep-fp 5%time needs the times of single layers.*or give 5%, a part of"):
        quick_build(tmp_path / "kept.qdm", "rgb", keep_fp="5%time", targets=("onnxruntime",))
    assert not (tmp_path / "kept.qdm").exists()
