"""Absorbed factors: the function stays, no multiply is left, integers match, and what must be refused is."""

from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from qdm_calibration.simulate import quantized_layer
from qdm_deploy.artifacts.phase_sums import upsampled
from qdm_deploy.artifacts.plan import TARGETS, QuantizationPlan
from qdm_export.absorb import absorb_factors
from qdm_export.check import layer_endpoints, with_outputs
from qdm_export.passes.channel_factors import ChannelFactors
from qdm_export.targets import FORMS, absorb, emit
from qdm_export.topology import layer_nodes

NAMES = ("labels", "rgb", "text")


def factored(plan: QuantizationPlan, seed: int = 5) -> QuantizationPlan:
    """The plan with a different k on every channel of every input: powers of two, with weight codes of W * k."""
    rng = np.random.default_rng(seed)
    per_group: dict[str, Any] = {}
    layers = []
    for item in plan.layers:
        if item.precision == "int8":
            old = np.ones(item.layer.in_channels, np.float32) if item.inverse_k is None else item.inverse_k
            new = np.exp2(rng.integers(0, 3, item.layer.in_channels)).astype(np.float32)
            new = per_group.setdefault(item.layer.input_group, new)
            columns = (1, -1) + (1,) * (item.codes.ndim - 2)
            codes = np.rint(item.codes * (old / new).reshape(columns)).clip(-127, 127).astype(np.int8)
            item = replace(item, inverse_k=new, weight_codes=codes)
        layers.append(item)
    return replace(plan, layers=tuple(layers))


def multiplies(graph: ir.Model) -> set[str]:
    return {
        str(node.name).removesuffix("/scale_channels")
        for node in graph.graph
        if node.name is not None and node.name.endswith("/scale_channels")
    }


def weight_of(layer: Any) -> Any:
    return layer.weight.const_value.numpy()


@pytest.mark.parametrize("name", NAMES)
def test_the_float_graph_computes_the_same(emitted: Any, tiny: Any, run_graph: Any, name: str) -> None:
    plan = factored(tiny.plan(name))
    graph = tiny.float_graph(name).clone()
    absorption = absorb_factors(graph, plan, unsigned=False, quantized_outputs=False)
    feeds = emitted.feeds(name, 3, seed=11)
    wanted, found = run_graph(tiny.float_graph(name), feeds), run_graph(graph, feeds)
    # Not a no-op: every input that the topology calls absorbable was absorbed, and weights changed for it.
    groups = {group for group, (first, *_) in tiny.topology(name).groups().items() if first.absorber is not None}
    assert {tiny.topology(name).layer(layer).input_group for layer in absorption.inputs} == groups
    assert groups
    before = {item.name: weight_of(item) for item in layer_nodes(tiny.float_graph(name))}
    after = {item.name: weight_of(item) for item in layer_nodes(graph)}
    changed = {layer for layer in after if not np.array_equal(before[layer], after[layer])}
    assert changed == absorption.inputs.keys() | absorption.outputs.keys()
    for key, value in wanted.items():
        np.testing.assert_allclose(found[key], value, atol=2e-6 * np.abs(value).max(), rtol=0)


def test_attention_and_upsampling_are_absorbed_and_convolutions_behind_silu_are_not(tiny: Any) -> None:
    absorbers = {layer.name: layer.absorber for layer in tiny.topology("labels")}
    assert absorbers["down_blocks.1.attentions.0.to_q"] == "norm"
    assert absorbers["down_blocks.1.attentions.0.to_v"] == "norm"
    assert absorbers["down_blocks.1.attentions.0.to_out.0"] == "weights"
    assert absorbers["up_blocks.0.upsamplers.0.conv"] == "weights"
    assert absorbers["down_blocks.0.resnets.0.conv2"] is None  # behind SiLU
    assert absorbers["down_blocks.0.downsamplers.0.conv"] is None  # its input is a skip as well
    assert absorbers["up_blocks.0.resnets.0.conv_shortcut"] is None  # a normalization reads the concatenation too
    text = {layer.name: layer.absorber for layer in tiny.topology("text")}
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    assert text[f"{block}.attn1.to_q"] == "norm"  # a LayerNormalization
    assert text[f"{block}.attn2.to_out.0"] == "weights"  # v reads the conditioning, in float


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["labels", "text"])
def test_every_layer_computes_what_the_simulation_computes(
    emitted: Any, tiny: Any, run_graph: Any, name: str, target: Any
) -> None:
    plan, network = factored(tiny.plan(name)), tiny.checkpoint(name).unet
    absorption = absorb(tiny.float_graph(name).clone(), plan, target)
    assert absorption.inputs
    graph = emit(tiny.float_graph(name), plan, target, rest="fp32").model
    assert not multiplies(graph) & absorption.inputs.keys()
    endpoints = layer_endpoints(graph, plan)
    feeds = emitted.feeds(name, 4, seed=7)
    feeds["timestep"] = np.array([5, 400, 700, 990], feeds["timestep"].dtype)
    values = run_graph(
        with_outputs(graph, [value for item in endpoints for value in (item.data, item.result)]), feeds, optimize=False
    )
    bins = torch.from_numpy(plan.bin_of_timestep()[feeds["timestep"].astype(np.int64)])
    for item in endpoints:
        entry = plan.layer(item.name)
        axis = (-1, 1, 1) if entry.layer.kind == "conv" else (-1,)
        # The planned layer, k and all, on the unscaled tensor: powers of two scale back without rounding.
        data = upsampled(values[item.data], entry.layer) / absorption.inputs.get(item.name, np.float32(1)).reshape(axis)
        layer = quantized_layer(network.get_submodule(f"unet.{item.name}"), entry, target, dtype=torch.float64)
        layer.time_bin = bins
        with torch.inference_mode():
            expected = layer(torch.from_numpy(data)).numpy()
        expected = expected * absorption.outputs.get(item.name, np.float32(1)).reshape(axis)
        error = np.abs(values[item.result] - expected)
        if target == "onnxruntime" and entry.output_scale is not None:
            gain = 1 if entry.inverse_r is None else 1 / entry.inverse_r[bins.numpy()].reshape(-1, 1, 1, 1)
            assert (error > 0.01 * entry.output_scale.reshape(1, -1, 1, 1) * gain).mean() < 5e-3, item.name
        else:
            assert error.max() < 2e-5 * np.abs(expected).max(), item.name


@pytest.mark.parametrize("target", TARGETS)
def test_the_emitted_codes_are_the_plans_and_the_scales_stay_exact_in_float16(tiny: Any, target: Any) -> None:
    plan = factored(tiny.plan("labels"))
    absorbed = absorb(tiny.float_graph("labels").clone(), plan, target).plan(plan)
    for before, after in zip(plan.quantized, absorbed.quantized, strict=True):
        np.testing.assert_array_equal(before.codes, after.codes)
        scale = after.weight_scales
        np.testing.assert_array_equal(scale, scale.astype(np.float16).astype(np.float32))
    assert any(not np.array_equal(a.weight_scales, b.weight_scales) for a, b in
               zip(plan.quantized, absorbed.quantized, strict=True))  # fmt: skip


def test_unsigned_targets_keep_a_factor_behind_a_norm_in_its_quantize(tiny: Any) -> None:
    plan = factored(tiny.plan("labels"))
    inputs = {target: absorb(tiny.float_graph("labels").clone(), plan, target).inputs for target in TARGETS}
    assert "up_blocks.0.upsamplers.0.conv" in inputs["tensorrt"]
    assert "up_blocks.0.upsamplers.0.conv" not in inputs["onnxruntime"]  # the producers' outputs have their own grids
    assert "down_blocks.1.attentions.0.to_out.0" in inputs["openvino"]
    left = {target: multiplies(emit(tiny.float_graph("labels"), plan, target).model) for target in TARGETS}
    for target in ("onnxruntime", "openvino"):
        assert left[target]
        assert not any(plan.layer(name).layer.normalized for name in left[target])
    assert "down_blocks.0.resnets.0.conv2" in left["tensorrt"]


def test_absorbing_can_be_switched_off(tiny: Any) -> None:
    plan = factored(tiny.plan("labels"))
    with_k = multiplies(
        emit(tiny.float_graph("labels"), plan, "tensorrt", form=replace(FORMS["tensorrt"], absorb_k=False)).model
    )
    assert with_k == {item.layer.input_group for item in plan.quantized}


def test_a_float_reader_beside_int8_ones_gets_k_in_its_weight(emitted: Any, tiny: Any, run_graph: Any) -> None:
    plan = factored(tiny.plan("labels"))
    name = "down_blocks.1.attentions.0.to_k"
    layers = [replace(item, precision="float", inverse_k=None) if item.name == name else item for item in plan.layers]
    graph = tiny.float_graph("labels").clone()
    absorption = absorb(graph, replace(plan, layers=tuple(layers)), "tensorrt")
    assert {name, "down_blocks.1.attentions.0.to_q"} <= absorption.inputs.keys()
    feeds = emitted.feeds("labels", 2)
    wanted, found = run_graph(tiny.float_graph("labels"), feeds)["x0"], run_graph(graph, feeds)["x0"]
    np.testing.assert_allclose(found, wanted, atol=2e-6 * np.abs(wanted).max(), rtol=0)


class Chain:
    """conv "first" -> middle -> conv "second", which has a k."""

    def __init__(self, small: Any, **changes: Any) -> None:
        self.graph = small((4, 6, 6))
        self.middle = self.graph.conv("first", out=4)
        self.changes = {"inverse_k": np.array([1, 2, 4, 8], dtype=np.float32), **changes}

    def finish(self, middle: ir.Value) -> tuple[ir.Model, QuantizationPlan]:
        self.graph.output(self.graph.conv("second", source=middle, **self.changes))
        return self.graph.model, self.graph.plan

    def node(self, op: str, *inputs: Any, shape: tuple[int, ...] = (4, 6, 6), **attributes: Any) -> ir.Value:
        return self.graph.node(op, list(inputs), shape, **attributes)  # type: ignore[no-any-return]

    def constant(self, name: str, values: Any) -> ir.Value:
        return self.graph.constant(name, np.asarray(values))  # type: ignore[no-any-return]


def absorbed(model: ir.Model, plan: QuantizationPlan, **form: bool) -> set[str]:
    return set(absorb_factors(model, plan, **{"unsigned": False, "quantized_outputs": False, **form}).inputs)


def test_a_chain_of_linear_operators_is_passed(small: Any, run_graph: Any) -> None:
    chain = Chain(small)
    shifted = chain.node("Add", chain.middle, chain.constant("shift", np.ones((4, 1, 1), np.float32)))
    halved = chain.node("Div", shifted, chain.constant("two", np.float32(2)))
    scales = chain.constant("scales", np.array([1, 1, 2, 2], np.float32))
    grown = chain.node("Resize", halved, None, scales, shape=(4, 12, 12), mode="nearest")
    model, plan = chain.finish(grown)
    feeds = {"x": np.random.default_rng(2).normal(size=(2, 4, 6, 6)).astype(np.float32),
             "timestep": np.zeros(2, np.int64)}  # fmt: skip
    before = run_graph(model.clone(), feeds)
    assert absorbed(model, plan) == {"second"}
    # k is in the weights of "second" and 1 / k in those of "first": together they change nothing.
    for key, value in run_graph(model, feeds).items():
        np.testing.assert_allclose(value, before[key], atol=2e-6 * np.abs(before[key]).max(), rtol=0)


@pytest.mark.parametrize("case", ["unscaled reader", "reader on the way", "nonlinear", "graph output", "mixed heads"])
def test_what_is_not_linear_or_read_elsewhere_keeps_its_multiply(small: Any, case: str) -> None:
    chain = Chain(small)
    value = chain.middle
    if case == "unscaled reader":
        chain.graph.output(chain.node("Neg", value))
    elif case == "reader on the way":
        chain.graph.output(value)
        value = chain.node("Identity", value)
    elif case == "nonlinear":
        value = chain.node("Relu", value)
    elif case == "graph output":
        chain.graph.graph.outputs.append(value)
    else:  # channels and places change their order, so no factor per channel of "first" does it
        flat = chain.node("Reshape", value, chain.constant("flat", np.array([0, 36, 4])), shape=(36, 4))
        turned = chain.node("Transpose", flat, shape=(4, 36), perm=[0, 2, 1])
        value = chain.node("Reshape", turned, chain.constant("back", np.array([0, 4, 6, 6])))
    model, plan = chain.finish(value)
    untouched = {item.name: weight_of(item).copy() for item in layer_nodes(model)}
    assert absorbed(model, plan) == set()
    for item in layer_nodes(model):
        np.testing.assert_array_equal(weight_of(item), untouched[item.name])
    ChannelFactors(plan, unsigned=False)(model)
    assert multiplies(model) == {"second"}


def test_a_scale_that_float16_cannot_hold_keeps_the_multiply(small: Any) -> None:
    chain = Chain(small, inverse_k=np.array([1, 1.25, 3, 5.5], dtype=np.float32))
    model, plan = chain.finish(chain.middle)
    scale = np.array([0.33325195, 0.5, 0.1, 0.7], dtype=np.float16).astype(np.float32)
    layers = tuple(replace(item, weight_scale=scale) if item.name == "first" else item for item in plan.layers)
    assert absorbed(model, replace(plan, layers=layers)) == set()


def test_a_producer_with_a_grid_on_its_output_keeps_it(small: Any) -> None:
    chain = Chain(small)
    model, plan = chain.finish(chain.middle)
    assert absorbed(model.clone(), plan, quantized_outputs=True) == set()
    assert absorbed(model.clone(), plan) == {"second"}


def test_shared_constants_are_changed_for_one_reader_only(emitted: Any, tiny: Any) -> None:
    graph = tiny.float_graph("labels").clone()
    before = {name: value.const_value.numpy().copy() for name, value in graph.graph.initializers.items()}
    absorb(graph, factored(tiny.plan("labels")), "tensorrt")
    for name, values in before.items():
        np.testing.assert_array_equal(graph.graph.initializers[name].const_value.numpy(), values)
