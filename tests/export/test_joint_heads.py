"""Queries, keys and values transposed as one tensor: the same numbers from fewer nodes."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qdm_export.passes.joint_heads import JointHeads
from qdm_export.targets import FORMS, emit


@pytest.fixture
def apart(tiny: Any) -> Callable[..., ir.Model]:
    """Emits the tensorrt target as it is without the pass."""
    form = FORMS["tensorrt"].without(JointHeads)
    return lambda name, **more: emit(tiny.float_graph(name), tiny.plan(name), "tensorrt", form=form, **more).model


def kinds(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


@pytest.mark.parametrize("name", ["labels", "text"])
def test_the_numbers_are_the_same_to_the_last_bit(
    apart: Callable[..., ir.Model], emitted: Any, tiny: Any, run_graph: Any, name: str
) -> None:
    # In float32: ONNX Runtime computes float16 in float32 and rounds where it pleases.
    joint = emit(tiny.float_graph(name), tiny.plan(name), "tensorrt", rest="fp32").model
    feeds = emitted.feeds(name, 3)
    expected = run_graph(apart(name, rest="fp32"), feeds, optimize=False)
    found = run_graph(joint, feeds, optimize=False)
    for key, value in expected.items():
        np.testing.assert_array_equal(found[key], value)


def test_a_self_attention_needs_two_transposes_and_no_shapes(apart: Callable[..., ir.Model], emitted: Any) -> None:
    before, joint = kinds(apart("labels")), kinds(emitted.graph("labels", "tensorrt"))
    attentions = joint["Softmax"]
    assert attentions == before["Softmax"] >= 2
    # Queries, keys, values and the keys' own swap become one for all and the swap.
    assert before["Transpose"] - joint["Transpose"] == 2 * attentions
    assert joint["Split"] - before["Split"] == attentions
    assert (before["Shape"] - joint["Shape"], joint["Shape"]) == (attentions, 0)
    # All of it is float16: a Cast inside would keep the engine from running attention as one kernel.
    assert before["Cast"] - joint["Cast"] == attentions  # those before the keys' Shape
    softmaxes = [node for node in emitted.graph("labels", "tensorrt").graph if node.op_type == "Softmax"]
    assert {value.dtype for node in softmaxes for value in node.inputs} == {ir.DataType.FLOAT16}


def test_attention_to_another_sequence_stays_as_it_is(emitted: Any) -> None:
    graph = emitted.graph("text", "tensorrt").graph
    joint = [node.name for node in graph if node.name and node.name.endswith("/heads/split")]
    softmaxes = [node for node in graph if node.op_type == "Softmax"]
    assert 0 < len(joint) < len(softmaxes)


def test_other_targets_keep_the_exporters_form(emitted: Any) -> None:
    for target in ("onnxruntime", "openvino"):
        assert not any("/heads/" in (node.name or "") for node in emitted.graph("labels", target).graph)
