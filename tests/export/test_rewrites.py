"""Every rewriting is counted against what the float graph promises, and a miss fails the build with a sentence."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from qdm_deploy.artifacts.plan import TARGETS
from qdm_deploy.errors import ExportError
from qdm_export.rewrites import Found, Place, Rewrite
from qdm_export.targets import emit, emit_float

NAMES = ("labels", "rgb", "text", "variance")
SPLIT = "another_exporter"


def counts(rewrites: tuple[Rewrite, ...]) -> dict[str, tuple[int, int]]:
    return {each.name: (each.done, each.expected) for each in rewrites}


def how_many(unet: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in unet.modules())


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", NAMES)
def test_counts_are_those_of_the_modules(tiny: Any, name: str, target: Any) -> None:
    unet, plan = tiny.checkpoint(name).unet.unet, tiny.plan(name)
    emission = emit(tiny.float_graph(name), plan, target)
    found = counts(emission.rewrites)
    assert not any(each.missed for each in emission.rewrites)
    norms, attentions = how_many(unet, nn.GroupNorm), how_many(unet, Attention)
    crossing = sum(isinstance(module, Attention) and module.is_cross_attention for module in unet.modules())
    layers = len(plan.quantized)
    assert found["weights"] == found["inputs"] == (layers, layers)
    if target == "tensorrt":
        assert found.get("attention heads", (0, 0)) == (attentions - crossing,) * 2
        assert found["half precision"][0] >= layers
        return
    assert found["norms"] == (norms, norms)
    blocks = how_many(unet, ResnetBlock2D)
    assert found["centred projections"] == (blocks, blocks)
    if target == "openvino":
        assert found.get("attention layout", (0, 0)) == (attentions, attentions)
        # Two in every residual block, and one behind the last norm.
        assert found["SiLU"] == (2 * blocks + 1, 2 * blocks + 1)


def test_places_that_a_rule_leaves_alone_are_not_expected(tiny: Any) -> None:
    found = {each.name: each for each in emit(tiny.float_graph("labels"), tiny.plan("labels"), "openvino").rewrites}
    for name, rule in (("time projections", "it depends on class_labels too"), ("bfloat16 attention", "too few")):
        assert found[name].expected == found[name].done == 0
        assert all(rule in each.reason for each in found[name].left)
        assert found[name].left


def insert_before(model: ir.Model, node: ir.Node, index: int, op_type: str = "Identity", **attributes: Any) -> None:
    """Another node on the way into ``node``, as an exporter of another version might write it."""
    value = node.inputs[index]
    assert value is not None
    made = ir.node(op_type, [value], attributes, name=SPLIT, metadata_props=dict(node.metadata_props))
    made.outputs[0].name, made.outputs[0].shape, made.outputs[0].type = f"{SPLIT}_out", value.shape, value.type
    model.graph.insert_before(node, made)
    node.replace_input_with(index, made.outputs[0])


def first(model: ir.Model, op_type: str) -> ir.Node:
    return next(node for node in model.graph if node.op_type == op_type)


def split_keys(model: ir.Model) -> None:
    scores = first(model, "Softmax").inputs[0].producer()  # type: ignore[union-attr]
    insert_before(model, scores.inputs[1].producer(), 0)  # type: ignore[union-attr,arg-type]


def cast_scores(model: ir.Model) -> None:
    insert_before(model, first(model, "Softmax"), 0, "Cast", to=int(ir.DataType.FLOAT))


def split_silu(model: ir.Model) -> None:
    sigmoid = next(node for node in model.graph if node.op_type == "Sigmoid" and len(node.inputs[0].shape) == 4)  # type: ignore[union-attr,arg-type]
    insert_before(model, sigmoid, 0)


def split_scale(model: ir.Model) -> None:
    insert_before(model, first(model, "GroupNormalization"), 1)


def split_upsampling(model: ir.Model) -> None:
    (reader,) = first(model, "Resize").outputs[0].uses()
    insert_before(model, reader.node, reader.idx)


def another_upsampling(model: ir.Model) -> None:
    first(model, "Resize").attributes["nearest_mode"] = ir.AttrString("nearest_mode", "round_prefer_floor")


def flatten_otherwise(model: ir.Model) -> None:
    norm = next(node for node in model.graph if node.op_type == "GroupNormalization" and len(node.inputs[0].shape) == 3)  # type: ignore[union-attr,arg-type]
    insert_before(model, norm, 0)


ATTENTION = "1 of 2; node_Softmax_* (down_blocks.1.attentions.0): "
CASES = [
    ("openvino", split_keys, f"attention layout: {ATTENTION}Identity {SPLIT} makes its keys, where a Reshape is"),
    ("tensorrt", split_keys, f"attention heads: {ATTENTION}Identity {SPLIT} makes its keys, where a Reshape is"),
    ("openvino", cast_scores, f"attention layout: {ATTENTION}Cast {SPLIT} makes its scores, where a MatMul is"),
    ("tensorrt", cast_scores, f"attention heads: {ATTENTION}Cast {SPLIT} makes its scores, where a MatMul is"),
    ("openvino", flatten_otherwise, f"attention inputs: 1 of 2; *group_norm): Identity {SPLIT} makes its input"),
    ("openvino", split_silu, "SiLU: 16 of 17; *: Mul * reads it, and does not multiply it by its own input"),
    ("onnxruntime", split_scale, "norms: * of *; *norm1): its scale and bias are not constants"),
    ("openvino", split_scale, "norms: * of *; *norm1): its scale and bias are not constants"),
    ("onnxruntime", split_upsampling, f"upsampling: 0 of 1; *: Identity {SPLIT} reads it, and not an INT8 layer alone"),
    ("openvino", another_upsampling, "upsampling: 0 of 1; *: it, or *upsamplers.0.conv behind it, is not of the form"),
]


def as_pattern(sentence: str) -> str:
    return "^" + re.escape(sentence).replace(r"\*", ".*")


@pytest.mark.parametrize(("target", "change", "sentence"), CASES)
def test_another_pattern_of_the_exporter_fails_the_build_with_a_sentence(
    tiny: Any, run_graph: Any, emitted: Any, target: Any, change: Callable[[ir.Model], None], sentence: str
) -> None:
    graph, plan = tiny.float_graph("labels").clone(), tiny.plan("labels")
    if change is another_upsampling:  # the topology, and with it the plan, is read from the changed graph
        plan = unrecognized(plan)
    change(graph)
    with pytest.raises(ExportError, match=as_pattern(sentence)):
        emit(graph, plan, target)


def unrecognized(plan: Any) -> Any:
    from dataclasses import replace

    layers = tuple(replace(item, layer=replace(item.layer, upsampled=False)) for item in plan.layers)
    return replace(plan, layers=layers)


@pytest.mark.parametrize(("target", "change"), [("openvino", split_keys), ("onnxruntime", split_scale)])
def test_a_miss_that_is_allowed_leaves_a_graph_that_computes_the_same(
    tiny: Any, run_graph: Any, emitted: Any, target: Any, change: Callable[[ir.Model], None]
) -> None:
    graph = tiny.float_graph("labels").clone()
    change(graph)
    emission = emit(graph, tiny.plan("labels"), target, allow_missed=True)
    (missed,) = [each for each in emission.rewrites if each.missed]
    assert missed.done == missed.expected - 1
    feeds = emitted.feeds("labels", 2)
    expected = run_graph(emitted.graph("labels", target), feeds, optimize=False)
    for key, value in run_graph(emission.model, feeds, optimize=False).items():
        error = float(np.square(value - expected[key]).sum() / np.square(expected[key]).sum())
        assert 10 * np.log10(max(error, 1e-30)) < -40  # codes next to a boundary may round the other way


def test_the_float_reference_is_counted_too(tiny: Any) -> None:
    graph = tiny.float_graph("rgb").clone()
    norms = how_many(tiny.checkpoint("rgb").unet.unet, nn.GroupNorm)
    assert counts(emit_float(graph).rewrites) == {"norms": (norms, norms)}
    split_scale(graph)
    with pytest.raises(ExportError, match=f"^norms: {norms - 1} of {norms}; .*The float graph would compute the same"):
        emit_float(graph)


def test_promises_are_held_against_what_was_found() -> None:
    promised = [Place("a", "block.0"), Place("b"), Place("c"), Place("d")]
    found = Found(done=["a"], missed={"b": "it is split", "x": "it only looks like one"}, left={"c": "it is small"})
    rewrite = Rewrite.of("things", promised, found)
    assert str(rewrite) == "things 1 of 3"
    assert [str(each) for each in rewrite.missed] == [
        "b: it is split",
        "d: no pass met it: the node was removed or renamed before",
    ]
    assert rewrite.rules == ("c: it is small", "x: it only looks like one")
