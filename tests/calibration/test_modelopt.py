"""Scales of ModelOpt as a plan: from a state file written by hand, and from ModelOpt itself where it is installed."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from qdm_calibration.modelopt import (
    modelopt_network,
    plan_from_modelopt,
    plan_from_quantizers,
    quantizers_of,
    read_quantizer_state,
    require_modelopt,
)
from qdm_calibration.simulate import simulate
from qdm_deploy.artifacts.plan import QuantizationPlan
from qdm_deploy.errors import EnvironmentProblem, InputError

CONV = "down_blocks.0.resnets.0.conv1"  # [16, 16, 3, 3]
ATTENTION = "down_blocks.1.attentions.0."  # to_q, to_k, to_v read one tensor; [32, 32]
State = dict[str, Any]
Plan = Callable[[State], QuantizationPlan]


def state_of(layer: str, amax: float, out: int, *, smooth: Any = None, weight: float = 0.127) -> State:
    values = {
        f"{layer}.input_quantizer._amax": np.array(amax, dtype=np.float32),
        f"{layer}.weight_quantizer._amax": np.full((out, 1), weight, dtype=np.float32),
    }
    if smooth is not None:
        values[f"{layer}.input_quantizer._pre_quant_scale"] = np.full(32, smooth, dtype=np.float32)
    return values


@pytest.fixture
def plan(tiny: Any, tmp_path: Path) -> Plan:
    """The plan of a state for the model "labels"."""

    def made(state: State) -> QuantizationPlan:
        save_file(state, tmp_path / "state.safetensors")
        quantizers = read_quantizer_state(tmp_path / "state.safetensors")
        unet, topology = tiny.checkpoint("labels").unet, tiny.topology("labels")
        return plan_from_quantizers(unet, topology, quantizers, tiny.statistics("labels"), source="a file")

    return made


# ------------------------------------------------------------------------------------------------------------ the file


def test_a_convolution_by_hand(plan: Plan, tiny: Any) -> None:
    state = {**state_of(CONV, 12.7, 16), "conv_in.weight": np.ones((2, 2), dtype=np.float32)}
    made = plan({**state, **state_of("conv_in", 3.0, 16)})
    layer = made.layer(CONV)
    assert (layer.precision, layer.zero_offset, layer.inverse_k, layer.inverse_r) == ("int8", 0, None, None)
    assert layer.scale == float(np.float16(0.1))
    assert set(layer.weight_scales.tolist()) == {float(np.float16(0.001))}
    weight = tiny.checkpoint("labels").unet.get_parameter(f"unet.{CONV}.weight").detach().numpy()
    np.testing.assert_array_equal(layer.codes, np.clip(np.rint(weight / np.float32(np.float16(0.001))), -127, 127))
    assert layer.notes == {"s": "ModelOpt (a file): amax 12.7", "z": "ModelOpt's grids are symmetric"}
    # Outputs are ours: the same grid as in a plan without gains.
    ours = tiny.plan("labels", ranges="mse", step_bins=1).layer(CONV)
    np.testing.assert_array_equal(layer.output_scale, ours.output_scale)
    np.testing.assert_array_equal(layer.output_zero_point, ours.output_zero_point)
    assert made.timestep_edges.tolist() == [0, 1000]
    # What only one of the two quantizes stays float and says why.
    assert made.layer(f"{ATTENTION}to_q").reason == "ModelOpt (a file) does not quantize it"
    assert made.layer("conv_in").reason == "first convolution: reads the sample itself"
    assert made.provenance["modelopt"] == {"source": "a file", "quantized_there_but_float_here": ["conv_in"]}
    assert made.summary()["int8"] == 1


def test_readers_of_one_tensor_share_the_largest_range(plan: Plan) -> None:
    ranges = {"to_q": 1.27, "to_k": 2.54, "to_v": 0.5}
    made = plan(
        {key: value for name, amax in ranges.items() for key, value in state_of(ATTENTION + name, amax, 32).items()}
    )
    layers = [made.layer(ATTENTION + name) for name in ranges]
    assert {layer.scale for layer in layers} == {float(np.float16(0.02))}
    assert layers[0].notes["s"] == "ModelOpt (a file): amax 2.54, the largest of 3 layers that share this input"


def test_smoothquant_is_the_factor_k(plan: Plan, tiny: Any) -> None:
    name = f"{ATTENTION}to_out.0"
    layer = plan(state_of(name, 1.27, 32, smooth=0.5)).layer(name)
    assert layer.inverse_k is not None
    assert layer.inverse_k.tolist() == [0.5] * 32
    weight = tiny.checkpoint("labels").unet.get_parameter(f"unet.{name}.weight").detach().numpy()
    scale = np.float32(np.float16(0.001))
    np.testing.assert_array_equal(layer.codes, np.clip(np.rint(weight / np.float32(0.5) / scale), -127, 127))
    assert layer.notes["k"] == "SmoothQuant's pre_quant_scale"


def test_smoothing_that_differs_is_averaged_and_measured_anew(plan: Plan, tiny: Any) -> None:
    state = {**state_of(f"{ATTENTION}to_q", 1.0, 32, smooth=0.25), **state_of(f"{ATTENTION}to_k", 1.0, 32, smooth=0.75)}
    made = plan({**state, **state_of(f"{ATTENTION}to_v", 1.0, 32, smooth=0.5)})
    data = tiny.statistics("labels").inputs[f"{ATTENTION}to_q"]
    amax = 0.5 * max(np.abs(data.channel_min).max(), np.abs(data.channel_max).max())
    for name in ("to_q", "to_k", "to_v"):
        layer = made.layer(ATTENTION + name)
        assert layer.inverse_k is not None
        assert layer.inverse_k.tolist() == [0.5] * 32
        assert layer.scale == pytest.approx(amax / 127, rel=1e-3)
        assert layer.notes["k"] == "mean of the pre_quant_scale of 3 layers that share this input"
        weight = tiny.checkpoint("labels").unet.get_parameter(f"unet.{ATTENTION}{name}.weight").detach().numpy()
        np.testing.assert_allclose(layer.weight_scales, np.abs(weight / 0.5).max(axis=1) / 127, rtol=1e-3)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"conv.weight": np.ones(1)}, r"state\.safetensors holds no layer with both <layer>\.input_quantizer\._amax"),
        (state_of("elsewhere", 1.0, 3), r"a file quantizes no layer .* called like 'elsewhere', .* like 'conv_in'"),
        (state_of("conv_in", 1.0, 16), r"a file quantizes no layer that this network can run in INT8"),
        (state_of(CONV, float("nan"), 16), rf"{CONV}\.input_quantizer\._amax in .* is empty, negative, NaN"),
        (
            {**state_of(CONV, 1.0, 16), f"{CONV}.input_quantizer._amax": np.ones(16, np.float32)},
            rf"{CONV}\.input_quantizer\._amax in .* has 16 values; an input has one scale per tensor",
        ),
        (state_of(CONV, 1.0, 8), rf"a file has 8 weight ranges for {CONV}, which has 16 output channels"),
        (state_of(CONV, 1.0, 16, smooth=1.0), rf"a file has 32 pre_quant_scale values for {CONV}, which has 16 input"),
    ],
)  # fmt: skip
def test_a_state_that_does_not_fit_is_refused(state: State, message: str, plan: Plan) -> None:
    with pytest.raises(InputError, match=message):
        plan(state)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"there is no file .*INT8_DEFALT_CFG, .* one of INT8_DEFAULT_CFG, INT8_SMOOTH"
    ):
        read_quantizer_state(tmp_path / "INT8_DEFALT_CFG")
    (tmp_path / "state.pt").write_bytes(b"PK\x03\x04 what torch.save writes")
    with pytest.raises(InputError, match=r"state\.pt cannot be read as safetensors .*save the state with safetensors"):
        read_quantizer_state(tmp_path / "state.pt")


# ------------------------------------------------------------------------------------------------------ ModelOpt itself


def test_an_unknown_configuration_is_refused(tiny: Any) -> None:
    with pytest.raises(
        InputError, match="ModelOpt configuration 'FP8_DEFAULT_CFG' is not known; choose one of INT8_DEF"
    ):
        modelopt_network(tiny.checkpoint("labels").unet, tiny.calibration("labels"), "FP8_DEFAULT_CFG")


@pytest.mark.skipif(find_spec("modelopt") is not None, reason="ModelOpt is installed")
def test_a_missing_modelopt_is_told() -> None:
    with pytest.raises(EnvironmentProblem, match=r"lacks; install it with pip install 'qdm-deploy\[modelopt\]'"):
        require_modelopt()


def own_plan(tiny: Any, config: str) -> QuantizationPlan:
    pytest.importorskip("modelopt")
    unet, topology, calibration = tiny.checkpoint("labels").unet, tiny.topology("labels"), tiny.calibration("labels")
    return plan_from_modelopt(unet, topology, calibration, config, tiny.statistics("labels"))


def test_modelopt_default_is_plain_symmetric_min_max(tiny: Any) -> None:
    made = own_plan(tiny, "INT8_DEFAULT_CFG")
    plain = tiny.plan("labels", zero_offset=False, concat_scales="none", step_bins=1, upsample_phases=False)
    assert [layer.name for layer in made.quantized] == [layer.name for layer in plain.quantized]
    for layer, ours in zip(made.quantized, plain.quantized, strict=True):
        assert layer.scale == pytest.approx(ours.scale, rel=5e-3), layer.name  # ours is of a histogram's bin
        # ModelOpt's range of a weight is float32, so its scale in float16 is ours.
        np.testing.assert_array_equal(layer.weight_scales, ours.weight_scales)
        np.testing.assert_array_equal(layer.codes, ours.codes)


def test_the_diffusers_filter_leaves_shortcuts_in_float(tiny: Any) -> None:
    made = own_plan(tiny, "INT8_DIFFUSERS")
    floats = {layer.name for layer in made.layers if layer.precision == "float"}
    extra = floats - {layer.name for layer in tiny.topology("labels") if layer.float_reason is not None}
    assert extra
    assert all(name.endswith("conv_shortcut") for name in extra)
    assert {made.layer(name).reason for name in extra} == {"ModelOpt (INT8_DIFFUSERS) does not quantize it"}


def test_smoothquant_computes_what_modelopt_computes(tiny: Any, tmp_path: Path) -> None:
    made = own_plan(tiny, "INT8_SMOOTHQUANT_CFG")
    name = f"{ATTENTION}to_out.0"
    assert made.layer(name).inverse_k is not None
    unet, calibration = tiny.checkpoint("labels").unet, tiny.calibration("labels")
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    theirs = modelopt_network(unet, calibration, "INT8_SMOOTHQUANT_CFG")
    x = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs.get_submodule(f"unet.{name}")(x)
        got = simulate(unet, made, "openvino").network.get_submodule(f"unet.{name}")(x)
        exact = unet.get_submodule(f"unet.{name}")(x)
    # Only the rounding of scales to float16 lies between them: a small part of what INT8 itself costs.
    assert (got - expected).pow(2).sum() < 0.25 * (exact - expected).pow(2).sum()
    # The saved state gives the same quantizers, and the user's network is as it was.
    state = {key: value.numpy() for key, value in theirs.unet.state_dict().items() if "quantizer" in key}
    save_file(state, tmp_path / "state")
    read, direct = read_quantizer_state(tmp_path / "state"), quantizers_of(theirs)
    assert set(read) == set(direct)
    assert all(read[key].input_amax == direct[key].input_amax for key in read)
    assert all(torch.equal(before[key], value) for key, value in unet.state_dict().items())
