"""The plan in PyTorch: codes by hand, exact integers, and nothing changed that the plan does not name."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from qdm_calibration.simulate import quantized_layer, simulate
from qdm_deploy.artifacts.plan import TARGETS, LayerPlan, QuantizationPlan
from qdm_deploy.artifacts.topology import Layer
from qdm_deploy.errors import InputError

Array = NDArray[Any]


def conv_plan(weight: Array, **changes: Any) -> tuple[nn.Conv2d, LayerPlan]:
    o, i, kh, kw = weight.shape
    layer = Layer("conv", "conv", weight.shape, "conv", (i,), False, (1, 1), (1, 1, 1, 1), (4, 4))
    values = {
        "scale": 0.5,
        "weight_codes": weight.astype(np.int8),
        "weight_scale": np.full(o, 0.25, dtype=np.float32),
        **changes,
    }
    module = nn.Conv2d(i, o, (kh, kw), padding=1)
    with torch.no_grad():
        module.bias.copy_(torch.arange(1.0, o + 1))
    return module, LayerPlan(layer, "int8", **values)


def per_channel(*scales: float) -> Array:
    return np.array(scales, dtype=np.float32)


def zeros_at(*codes: int) -> Array:
    return np.array(codes, dtype=np.uint8)


def image(values: list[float]) -> torch.Tensor:
    return torch.tensor(values).reshape(1, 1, 1, -1)


@pytest.mark.parametrize("target", TARGETS)
def test_activation_codes_by_hand(target: Any) -> None:
    module, plan = conv_plan(np.ones((1, 1, 3, 3)), zero_offset=2)
    layer = quantized_layer(module, plan, target)
    # Steps of 0.5 are 0.5, 1.5, 2.5 (ties go to even: 0, 2, 2), 10, and far out on both sides; then minus z.
    codes = layer.codes(image([0.25, 0.75, 1.25, 5.0, 1000.0, -1000.0, 0.0])).flatten().tolist()
    assert codes == [-2, 0, 0, 8, 127, -128, -2]


def test_one_convolution_by_hand() -> None:
    weight = np.zeros((2, 1, 3, 3))
    weight[0, 0, 1, 1], weight[1, 0, 1, 1], weight[1, 0, 1, 2] = 4, -2, 3
    module, plan = conv_plan(weight)
    x = image([1.0, 1.3, -70.0])  # codes 2, 3 (2.6 rounds to 3), -128 (clipped)
    y = quantized_layer(module, plan, "openvino")(x)
    # 0.125 per unit of the product: 0.125 * 4 q + 1, and 0.125 * (-2 q + 3 q_right) + 2 with zero padding.
    assert y[0, 0, 0].tolist() == [2.0, 2.5, -63.0]
    assert y[0, 1, 0].tolist() == [2 + 0.125 * 5, 2 + 0.125 * (-6 - 384), 2 + 0.125 * 256]


def test_onnxruntime_also_rounds_its_bias_and_its_output() -> None:
    weight = np.zeros((2, 1, 3, 3))
    weight[:, 0, 1, 1] = [4, -2]
    module, plan = conv_plan(weight, output_scale=per_channel(0.75, 0.75), output_zero_point=zeros_at(100, 100))
    with torch.no_grad():
        module.bias.copy_(torch.tensor([1.05, -3.0]))  # 8.4 and -24 units of 0.125: 8 and -24
    y = quantized_layer(module, plan, "onnxruntime")(image([1.0, 1.3, -70.0]))
    # Channel 0: 0.125 * (8 + 8) = 2, * (12 + 8) = 2.5, * (-512 + 8) = -63; in steps of 0.75: 2.67, 3.33, -84.
    assert y[0, 0, 0].tolist() == [3 * 0.75, 3 * 0.75, -84 * 0.75]
    # Channel 1: 0.125 * (-4 - 24) = -3.5 is -4.67 steps; the others -3.75 and 29, 38.67 steps.
    assert y[0, 1, 0].tolist() == [-5 * 0.75, -5 * 0.75, 39 * 0.75]
    # A bias of 7.6 units counts as 8: 16 units are 12.8 steps of 1.25 units, where 15.6 would be 12.48.
    with torch.no_grad():
        module.bias.fill_(7.6 * 0.125)
    fine = quantized_layer(module, replace(plan, output_scale=per_channel(0.15625, 0.75)), "onnxruntime")(image([1.0]))
    assert fine[0, 0, 0, 0] == 13 * 0.15625
    with torch.no_grad():
        module.bias.copy_(torch.tensor([1.05, -3.0]))
    clipped = quantized_layer(module, replace(plan, output_zero_point=zeros_at(100, 250)), "onnxruntime")(
        image([1.0, 1.3, -70.0])
    )
    assert clipped[0, 1, 0, 2] == 5 * 0.75  # code 255


@pytest.mark.parametrize("target", TARGETS)
def test_activations_of_6_bits_err_12_db_more_than_of_8(target: Any) -> None:
    rng = np.random.default_rng(5)
    x = torch.from_numpy(rng.uniform(-3, 5, (2, 16, 12, 12)).astype(np.float32))
    weight = rng.integers(-127, 128, (8, 16, 3, 3))
    noise = {}
    for bits in (8, 6):
        levels = 2**bits - 1
        module, plan = conv_plan(weight, scale=8 / levels, zero_offset=round(levels / 8))
        layer = quantized_layer(module, plan, target)
        layer.levels = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        codes = layer.codes(x)
        assert (codes.min(), codes.max()) == layer.levels
        exact = functional.conv2d(
            x, layer.weight_codes * layer.weight_scale.reshape(-1, 1, 1, 1), module.bias, padding=1
        )
        noise[bits] = float((layer(x) - exact).detach().square().mean())
    assert 10 * np.log10(noise[6] / noise[8]) == pytest.approx(12.04, abs=0.5)


def naive(x: Array, plan: LayerPlan, module: nn.Conv2d) -> Array:
    """Convolution of the dequantized input with the dequantized weight, padded with 0.0, in float64."""
    steps = np.clip(np.rint(x / plan.scale) - plan.zero_offset, -128, 127) + plan.zero_offset
    values, weight = steps * plan.scale, plan.codes * plan.weight_scales.astype(np.float64).reshape(-1, 1, 1, 1)
    padded = np.pad(values, ((0, 0), (0, 0), (1, 1), (1, 1)))
    o, h, w = len(weight), x.shape[2], x.shape[3]
    y = np.zeros((len(x), o, h, w))
    for i in range(h):
        for j in range(w):
            y[:, :, i, j] = np.einsum("bcij,ocij->bo", padded[:, :, i : i + 3, j : j + 3], weight)
    return y + module.bias.detach().numpy().reshape(1, -1, 1, 1)


@pytest.mark.parametrize("offset", [-100, 0, 78, 128])
@pytest.mark.parametrize("target", ["openvino", "tensorrt"])
def test_an_offset_pads_with_zero_at_the_border(offset: int, target: Any) -> None:
    rng = np.random.default_rng(0)
    module, plan = conv_plan(rng.integers(-127, 128, (5, 3, 3, 3)), zero_offset=offset)
    x = (rng.normal(size=(2, 3, 4, 6)) * 10 + offset * 0.5).astype(np.float32)
    y = quantized_layer(module, plan, target)(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(y, naive(x.astype(np.float64), plan, module), atol=1e-3)


def test_float32_and_float64_hold_the_same_integers() -> None:
    rng = np.random.default_rng(1)
    module, plan = conv_plan(rng.integers(-127, 128, (16, 64, 3, 3)))
    x = torch.from_numpy(rng.normal(size=(2, 64, 6, 6)).astype(np.float32) * 20)
    single, double = (
        quantized_layer(module, plan, "openvino", dtype=dtype) for dtype in (torch.float32, torch.float64)
    )
    assert torch.equal(single.product(single.codes(x)).double(), double.product(double.codes(x).double()))
    difference = (single(x) - double(x)).abs().max() / double(x).abs().max()
    assert difference < 1e-6
    assert double(x).dtype == torch.float32


@pytest.mark.parametrize("target", ["openvino", "tensorrt"])
def test_channel_factors_scale_the_input(target: Any) -> None:
    inverse_k = np.array([8.0, 1.0], dtype=np.float32)
    module, plan = conv_plan(np.ones((1, 2, 3, 3)), inverse_k=inverse_k)
    layer = quantized_layer(module, plan, target)
    codes = layer.codes(torch.tensor([0.5, 4.0]).reshape(1, 2, 1, 1)).flatten().tolist()
    assert codes == [8, 8]


def linear_plan(**changes: Any) -> tuple[nn.Linear, LayerPlan]:
    codes = np.array([[2, -3], [127, 1], [0, 5]], dtype=np.int8)
    layer = Layer("linear", "linear", (3, 2), "linear", (2,), False)
    values = {
        "scale": 0.5,
        "weight_codes": codes,
        "weight_scale": np.array([1, 0.5, 0.25], dtype=np.float32),
        **changes,
    }
    module = nn.Linear(2, 3)
    with torch.no_grad():
        module.bias.copy_(torch.tensor([10.0, 20.0, 30.0]))
    return module, LayerPlan(layer, "int8", **values)


@pytest.mark.parametrize("target", TARGETS)
def test_one_linear_by_hand(target: Any) -> None:
    module, plan = linear_plan(zero_offset=1)
    y = quantized_layer(module, plan, target)(torch.tensor([[[1.0, -2.2]]]))  # 2 and -4 steps
    assert y.tolist() == [[[10 + 0.5 * (4 + 12), 20 + 0.25 * (254 - 4), 30 + 0.125 * -20]]]


def test_gains_by_hand() -> None:
    module, plan = linear_plan(inverse_r=np.array([1.0, 0.25], dtype=np.float32))
    layer = quantized_layer(module, plan, "openvino")
    layer.time_bin = torch.tensor([0, 1])
    x = torch.tensor([[[1.0, -2.0]], [[4.0, -8.0]]])
    y = layer(x)
    assert layer.codes(x)[0].tolist() == layer.codes(x)[1].tolist() == [[2, -4]]
    assert y[0].tolist() == [[10 + 0.5 * 16, 20 + 0.25 * 250, 30 - 0.125 * 20]]
    assert y[1].tolist() == [[10 + 4 * 0.5 * 16, 20 + 4 * 0.25 * 250, 30 - 4 * 0.125 * 20]]


# ------------------------------------------------------------------------------------------------------- whole networks


def inputs(tiny: Any, name: str, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    data = tiny.calibration(name)
    conditioning = {key: torch.from_numpy(value[rows]) for key, value in data.conditioning.items()}
    return torch.from_numpy(data.sample[rows]), torch.from_numpy(data.timestep[rows]), conditioning


def sqnr_db(reference: torch.Tensor, value: torch.Tensor) -> float:
    return float(10 * torch.log10((reference**2).sum() / ((reference - value) ** 2).sum()))


@pytest.mark.parametrize("name", ["labels", "rgb", "text", "variance"])
def test_a_plan_of_float_layers_changes_nothing(tiny: Any, name: str) -> None:
    plan = tiny.plan(name)
    floats = replace(plan, layers=tuple(LayerPlan(item.layer, "float", reason="test") for item in plan.layers))
    sample, timestep, conditioning = inputs(tiny, name, [0, 20, 40])
    with torch.inference_mode():
        expected = tiny.checkpoint(name).unet(sample, timestep, **conditioning)
        found = simulate(tiny.checkpoint(name).unet, floats, "tensorrt")(sample, timestep, **conditioning)
    assert torch.equal(expected, found)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["labels", "rgb", "text", "variance"])
def test_the_simulation_is_close_to_the_network(tiny: Any, name: str, target: Any) -> None:
    sample, timestep, conditioning = inputs(tiny, name, list(range(0, 48, 5)))
    network = tiny.checkpoint(name).unet
    with torch.inference_mode():
        expected = network(sample, timestep, **conditioning)
        found = simulate(network, tiny.plan(name), target)(sample, timestep, **conditioning)
    assert 20 < sqnr_db(expected, found) < 60
    assert (expected - found).abs().max() < 0.2 * expected.abs().max()


def test_targets_differ_only_where_they_should(tiny: Any) -> None:
    sample, timestep, conditioning = inputs(tiny, "labels", [3, 60])
    network, plan = tiny.checkpoint("labels").unet, tiny.plan("labels")
    with torch.inference_mode():
        results = {t: simulate(network, plan, t)(sample, timestep, **conditioning) for t in TARGETS}
    assert not torch.equal(results["onnxruntime"], results["openvino"])
    assert sqnr_db(results["openvino"], results["tensorrt"]) > sqnr_db(results["openvino"], results["onnxruntime"])


def test_rows_of_a_mixed_batch_use_the_gains_of_their_own_timestep(tiny: Any) -> None:
    plan = tiny.plan("labels")
    bins = plan.bin_of_timestep()[tiny.calibration("labels").timestep]
    rows = [int(np.flatnonzero(bins == j)[0]) for j in range(plan.num_step_bins)]
    simulation = simulate(tiny.checkpoint("labels").unet, plan, "openvino", dtype=torch.float64)
    sample, timestep, conditioning = inputs(tiny, "labels", rows)
    with torch.inference_mode():
        batch = simulation(sample, timestep, **conditioning)
        alone = torch.cat(
            [simulation(*inputs(tiny, "labels", [row])[:2], **inputs(tiny, "labels", [row])[2]) for row in rows]
        )
        wrong = simulation(sample, timestep.flip(0), **conditioning)
    # Sums of a float kernel may take another order in another batch, and flip a code: that is far below a wrong gain.
    assert sqnr_db(alone, batch) > 45
    assert sqnr_db(alone, wrong) < 30


def test_the_original_network_is_untouched_and_its_float_weights_are_shared(tiny: Any) -> None:
    network, plan = tiny.checkpoint("labels").unet, tiny.plan("labels")
    before = {name: (id(p), p.detach().clone()) for name, p in network.named_parameters()}
    modules = [type(module) for module in network.modules()]
    simulation = simulate(network, plan, "openvino")
    sample, timestep, conditioning = inputs(tiny, "labels", [0])
    with torch.inference_mode():
        simulation(sample, timestep, **conditioning)
    assert [type(module) for module in network.modules()] == modules
    for name, p in network.named_parameters():
        assert id(p) == before[name][0]
        assert torch.equal(p, before[name][1])
    shared = dict(simulation.network.named_parameters())
    assert id(shared["unet.conv_in.weight"]) == before["unet.conv_in.weight"][0]
    assert "unet.mid_block.resnets.0.conv1.weight" not in shared


def test_an_unknown_target_is_refused(tiny: Any) -> None:
    with pytest.raises(InputError, match="target 'coreml' is not known; choose one of onnxruntime, openvino, tensorrt"):
        simulate(tiny.checkpoint("rgb").unet, tiny.plan("rgb"), "coreml")  # type: ignore[arg-type]


def test_strides_are_those_of_the_layer() -> None:
    module, plan = conv_plan(np.random.default_rng(0).integers(-9, 9, (2, 1, 3, 3)))
    module.stride = (2, 2)
    x = torch.randint(-20, 20, (1, 1, 7, 5)) * 0.5
    y = quantized_layer(module, plan, "openvino")(x)
    weight = torch.from_numpy(plan.codes * 0.25).float()
    torch.testing.assert_close(y, functional.conv2d(x, weight, module.bias, 2, 1))


def test_the_bins_come_from_the_plan() -> None:
    plan = QuantizationPlan((), np.array([0, 3, 10]))
    assert plan.bin_of_timestep().tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 1, 1]
    assert plan.num_step_bins == 2
