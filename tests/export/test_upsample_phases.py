"""A convolution behind an upsampling, in phases: the same integers, wherever it is possible and nowhere else."""

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from qdm_calibration.phase_scales import scale_for_phases
from qdm_calibration.ranges import weight_scale
from qdm_deploy.artifacts.phase_sums import PHASES, fits_phases, phase_sums, upsampled
from qdm_deploy.artifacts.plan import QuantizationPlan
from qdm_deploy.metrics.error import sqnr_db
from qdm_export.passes.upsample_phases import UpsamplePhases
from qdm_export.targets import FORMS, emit
from qdm_export.topology import topology_of


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def phased(plan: QuantizationPlan) -> list[str]:
    return [layer.name for layer in plan.quantized if fits_phases(layer)]


@pytest.mark.parametrize("seed", range(3))
def test_the_sums_are_the_convolution_of_the_upsampled_tensor(seed: int) -> None:
    rng = np.random.default_rng(seed)
    kernel = rng.integers(-127, 128, (5, 3, 3, 3))
    small = torch.from_numpy(rng.integers(-128, 128, (2, 3, 4, 7)).astype(np.float64))
    large = torch.nn.functional.interpolate(small, scale_factor=2, mode="nearest")
    whole = torch.nn.functional.conv2d(large, torch.from_numpy(kernel.astype(np.float64)), padding=1).numpy()
    for row, column in PHASES:
        weight = torch.from_numpy(phase_sums(kernel, (row, column)).astype(np.float64))
        padded = torch.nn.functional.pad(small, (1 - column, column, 1 - row, row))
        part = torch.nn.functional.conv2d(padded, weight).numpy()
        np.testing.assert_array_equal(part, whole[:, :, row::2, column::2])


def test_the_transposed_convolution_of_all_sums_is_the_same() -> None:
    rng = np.random.default_rng(0)
    kernel, small = rng.normal(size=(4, 3, 3, 3)), torch.from_numpy(rng.normal(size=(2, 3, 5, 5)))
    large = torch.nn.functional.interpolate(small, scale_factor=2, mode="nearest")
    whole = torch.nn.functional.conv2d(large, torch.from_numpy(kernel), padding=1)
    ones = torch.ones(1, 1, 2, 2, dtype=torch.float64)
    flat = torch.from_numpy(kernel[..., ::-1, ::-1].copy()).reshape(12, 1, 3, 3)
    sums = torch.nn.functional.conv2d(flat, ones, padding=1).reshape(4, 3, 4, 4).transpose(0, 1)
    transposed = torch.nn.functional.conv_transpose2d(small, sums, stride=2, padding=1)
    torch.testing.assert_close(transposed, whole)


@pytest.mark.parametrize("name", ["labels", "rgb"])
def test_every_upsampling_of_the_network_is_seen(tiny: Any, name: str) -> None:
    topology = tiny.topology(name)
    found = {layer.name for layer in topology if layer.upsampled}
    assert found == {layer.name for layer in topology if layer.name.endswith("upsamplers.0.conv")}
    assert found


@pytest.mark.parametrize("change", ["factor", "mode", "rounding", "padding", "reader"])
def test_another_upsampling_or_convolution_is_left_alone(tiny: Any, change: str) -> None:
    model = tiny.float_graph("rgb").clone()
    resize = next(node for node in model.graph if node.op_type == "Resize")
    reader = next(iter(resize.outputs[0].uses())).node
    before = {layer.name for layer in topology_of(model) if layer.upsampled}
    if change == "factor":
        batch, channels, *sizes = resize.inputs[0].shape
        resize.inputs[0].shape = ir.Shape([batch, channels, *(size + 1 for size in sizes)])
    elif change == "mode":
        resize.attributes["mode"] = ir.AttrString("mode", "linear")
    elif change == "rounding":
        resize.attributes["nearest_mode"] = ir.AttrString("nearest_mode", "ceil")
    elif change == "padding":
        reader.attributes["pads"] = ir.AttrInt64s("pads", [1, 1, 0, 0])
    else:
        model.graph.append(ir.node("Relu", resize.outputs, name="another_reader"))
    after = {layer.name for layer in topology_of(model) if layer.upsampled}
    assert len(before - after) == 1


@pytest.mark.parametrize("name", ["labels", "rgb"])
@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_a_graph_in_phases_has_no_upsampling_and_returns_the_same(
    emitted: Any, tiny: Any, run_graph: Any, name: str, target: Any
) -> None:
    plan = tiny.plan(name)
    whole = emit(tiny.float_graph(name), plan, target, form=FORMS[target].without(UpsamplePhases)).model
    parts = emitted.graph(name, target)
    layers = phased(plan)
    assert layers
    assert operators(whole)["Resize"] - operators(parts)["Resize"] == len(layers)
    assert operators(parts)["Conv"] - operators(whole)["Conv"] == 3 * len(layers)
    feeds = emitted.feeds(name, 3, seed=5)
    before, after = (run_graph(graph, feeds, optimize=False) for graph in (whole, parts))
    for key, value in before.items():
        if target == "onnxruntime":  # integers, and what is computed of them in the same order
            np.testing.assert_array_equal(after[key], value)
        else:  # float sums of a float kernel here: another order, and now and then another code behind it
            assert sqnr_db(value, after[key]) > 50


def test_gains_and_factors_are_applied_to_the_small_tensor(emitted: Any, tiny: Any) -> None:
    plan = tiny.plan("labels")
    layer = next(plan.layer(name) for name in phased(plan) if plan.layer(name).inverse_r is not None)
    nodes = {node.name: node for node in emitted.graph("labels", "openvino").graph}
    scaled = nodes[f"{layer.name}/scale_step"].outputs[0]
    assert tuple(scaled.shape)[2:] == tuple(size // 2 for size in layer.layer.spatial)


def test_sums_that_do_not_fit_stay_whole(emitted: Any, tiny: Any) -> None:
    own = tiny.plan("rgb", upsample_phases=False)
    assert not phased(own)
    graph = emit(tiny.float_graph("rgb"), own, "openvino").model
    assert operators(graph)["Resize"] == sum(layer.upsampled for layer in tiny.topology("rgb"))
    assert not any("phase" in (node.name or "") for node in graph.graph)


def test_a_layer_in_float_stays_whole(tiny: Any) -> None:
    plan = tiny.plan("rgb")
    name = phased(plan)[0]
    layers = tuple(replace(item, precision="float") if item.name == name else item for item in plan.layers)
    assert phased(replace(plan, layers=layers)) == phased(plan)[1:]


@pytest.mark.parametrize("bits", [8, 4])
def test_scales_grow_no_more_than_the_sums_need(bits: int) -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(6, 8, 3, 3)).astype(np.float32)
    weight[1] = np.abs(weight[1])  # sums of four
    weight[2, 0, 0, 0] = 9.0  # one large tap, that no sum exceeds
    weight[3] = 0.0
    own = weight_scale(weight, "minmax", bits)
    fitting, _ = scale_for_phases(weight, own, bits)
    largest = (2 ** (bits - 1)) - 1

    def sums(scale: Any) -> Any:
        codes = np.clip(np.rint(weight / scale.reshape(-1, 1, 1, 1)), -largest, largest).astype(np.int8)
        return np.max([np.abs(phase_sums(codes, phase)).max(axis=(1, 2, 3)) for phase in PHASES], axis=0)

    assert sums(fitting).max() <= 123
    np.testing.assert_array_equal(fitting.astype(np.float16), fitting)
    grown = fitting > own
    np.testing.assert_array_equal(grown, sums(own) > 123)
    if bits == 4:
        assert not grown.any()
    else:
        assert grown[1]
        assert (sums(fitting / np.float32(1.03))[grown] > 123).all()


def test_learned_rounding_still_fits() -> None:
    rng = np.random.default_rng(1)
    weight = rng.normal(size=(16, 8, 3, 3)).astype(np.float32)
    scale = scale_for_phases(weight, weight_scale(weight, "minmax"), 8)[0].reshape(-1, 1, 1, 1)
    down = np.floor(weight / scale)
    for _ in range(20):
        learned = down + rng.integers(0, 2, weight.shape)
        assert max(np.abs(phase_sums(learned, phase)).max() for phase in PHASES) <= 127


def test_the_input_of_a_whole_layer_is_made_of_the_small_tensor(tiny: Any) -> None:
    layer = next(layer for layer in tiny.topology("rgb") if layer.upsampled)
    height, width = layer.spatial
    small = np.random.default_rng(0).normal(size=(2, 3, height // 2, width // 2)).astype(np.float32)
    expected = torch.nn.functional.interpolate(torch.from_numpy(small), scale_factor=2, mode="nearest").numpy()
    np.testing.assert_array_equal(upsampled(small, layer), expected)
    np.testing.assert_array_equal(upsampled(expected, layer), expected)


def test_the_plan_says_what_the_sums_cost(tiny: Any) -> None:
    plan, own = tiny.plan("rgb"), tiny.plan("rgb", upsample_phases=False)
    (name,) = phased(plan)
    assert "sums of the codes are int8" in plan.layer(name).notes["w"]
    assert "w" not in own.layer(name).notes
    assert plan.layer(name).weight_sqnr_db < own.layer(name).weight_sqnr_db
    assert "w" not in tiny.plan("rgb", weight_bits=4).layer(name).notes
