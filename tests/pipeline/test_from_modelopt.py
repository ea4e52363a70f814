"""Builds with scales of ModelOpt: from a state file, and what is refused before any work."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from qdm_deploy.artifacts.plan import QuantizationPlan
from qdm_deploy.errors import EnvironmentProblem, InputError

# The defaults: the quick builds' own choices would contradict it.
OURS: dict[str, Any] = {
    "ranges": "lp", "step_bins": "auto", "channel_factors": "free", "output_correction": False,
    "targets": ("onnxruntime",),
}  # fmt: skip


def test_a_state_file_becomes_the_plan_of_a_bundle(quick_build: Any, tiny: Any, tmp_path: Path) -> None:
    state = {}
    for layer in tiny.plan("labels", zero_offset=False, concat_scales="none", step_bins=1).quantized:
        state[f"{layer.name}.input_quantizer._amax"] = np.array(layer.scale * 127, dtype=np.float32)
        state[f"{layer.name}.weight_quantizer._amax"] = layer.weight_scales * 127
    save_file(state, tmp_path / "state.safetensors")
    built = quick_build(tmp_path / "x.qdm", from_modelopt=str(tmp_path / "state.safetensors"), **OURS)
    plan = QuantizationPlan.load(built.bundle / "unet")
    assert plan.options["from_modelopt"] == "state.safetensors"
    assert plan.summary()["int8"] == len(state) // 2
    assert all((layer.zero_offset, layer.inverse_r) == (0, None) for layer in plan.quantized)
    row = built.report.quality[0]
    assert row.eps_sqnr_mean_db > 20  # symmetric min-max of these weights; wrong scales give less than 5 dB


def test_a_missing_file_is_told_before_the_calibration(quick_build: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no file INT8_CFG, and no ModelOpt configuration of that name"):
        quick_build(tmp_path / "x.qdm", from_modelopt="INT8_CFG", **OURS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(find_spec("modelopt") is not None, reason="ModelOpt is installed")
def test_a_missing_modelopt_is_told_before_the_calibration(quick_build: Any, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match=r"pip install 'qdm-deploy\[modelopt\]', or give a file"):
        quick_build(tmp_path / "x.qdm", from_modelopt="INT8_DIFFUSERS", **OURS)
    assert list(tmp_path.iterdir()) == []
