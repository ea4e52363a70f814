"""Attention's operands turned without a pass over memory: the same numbers, and OpenVINO has nothing left to move."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qdm_deploy.backends.openvino.graph import compile_graph, import_openvino, read_graph
from qdm_deploy.runtime.cpu import cpu_flags
from qdm_export.passes.attention_layout import AttentionInput, AttentionLayout
from qdm_export.passes.bfloat16_attention import Bfloat16Attention
from qdm_export.targets import FORMS, emit


def as_exported(tiny: Any, name: str) -> ir.Model:
    form = FORMS["openvino"].without(AttentionInput, AttentionLayout)
    return emit(tiny.float_graph(name), tiny.plan(name), "openvino", form=form).model


def kinds(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


@pytest.mark.parametrize("name", ["labels", "rgb", "text"])
def test_the_numbers_are_the_same(tiny: Any, emitted: Any, run_graph: Any, name: str) -> None:
    feeds = emitted.feeds(name, 3)
    expected = run_graph(as_exported(tiny, name), feeds, optimize=False)
    found = run_graph(emitted.graph(name, "openvino"), feeds, optimize=False)
    assert expected.keys() == found.keys()
    for key, value in expected.items():  # sums of a norm run over the same numbers in another order
        np.testing.assert_allclose(found[key], value, atol=1e-5)
    onnx.checker.check_model(ir.to_proto(emitted.graph(name, "openvino")), full_check=True)


@pytest.mark.parametrize("name", ["labels", "text"])
def test_every_attention_swaps_its_keys_right_before_the_product(tiny: Any, emitted: Any, name: str) -> None:
    before, after = kinds(as_exported(tiny, name)), kinds(emitted.graph(name, "openvino"))
    assert after["Softmax"] == before["Softmax"] >= 2
    assert after["Shape"] == 0 < before["Shape"]
    for node in emitted.graph(name, "openvino").graph:
        if node.op_type == "Softmax":
            swap = node.inputs[0].producer().inputs[1].producer()
            assert tuple(swap.attributes["perm"].as_ints()) == (0, 1, 3, 2)
            assert swap.inputs[0].producer().op_type == "Mul"
            queries = node.inputs[0].producer().inputs[0].producer()
            assert (queries.op_type, queries.inputs[0].producer().op_type) == ("Transpose", "Mul")
    assert not AttentionLayout()(emitted.graph(name, "openvino").clone()).modified


def turned(model: ir.Model, feeds: dict[str, Any], path: Path) -> set[str]:
    """Nodes that OpenVINO executes to transpose an activation, in its names of them."""
    onnx.save(ir.to_proto(model), path)
    read = read_graph(path, cpu_flags())
    read.reshape({item.any_name: list(feeds[item.any_name].shape) for item in read.inputs})
    options = {"INFERENCE_PRECISION_HINT": "f32", "PERF_COUNT": True}
    request = compile_graph(import_openvino().Core(), read, options).create_infer_request()
    request.infer({item.any_name: feeds[item.any_name] for item in read.inputs})
    done = {
        node.node_name
        for node in request.profiling_info
        if node.node_type == "Transpose" and node.status.name == "EXECUTED"
    }
    return {name for name in done if not name.endswith("transpose_b")}  # weights, when the graph was compiled


@pytest.mark.parametrize("least_scores", [None, 1])
def test_openvino_turns_keys_into_heads_and_little_else(
    tiny: Any, emitted: Any, tmp_path: Path, least_scores: int | None
) -> None:
    pytest.importorskip("openvino")
    if "avx512f" not in cpu_flags():
        pytest.skip("would show which transposes OpenVINO's AVX-512 attention kernel absorbs; this CPU has no AVX-512")
    form = FORMS["openvino"]
    form = form.without(Bfloat16Attention) if least_scores is None else replace(form, least_scores=least_scores)
    graph = emit(tiny.float_graph("labels"), tiny.plan("labels"), "openvino", form=form).model
    feeds = emitted.feeds("labels", 2)
    before = turned(as_exported(tiny, "labels"), feeds, tmp_path / "before.onnx")
    after = turned(graph, feeds, tmp_path / "after.onnx")
    attentions = kinds(graph)["Softmax"]
    assert len(before) >= 3 * attentions
    # In bfloat16 the result is turned out of its heads too: OpenVINO casts it first.
    assert len(after) <= attentions * (1 if least_scores is None else 2)


def reason_of(graph: Any) -> str:
    """Why the one norm of a graph was passed by."""
    result = AttentionInput()(graph.model)
    assert not result.modified
    (reason,) = result.found.missed.values()
    return str(reason)


def test_a_norm_that_somebody_else_reads_stays_where_it_is(small: Any) -> None:
    graph = small((4, 3, 5))
    ones, zeros = (graph.constant(n, np.full(4, v, np.float32)) for n, v in (("scale", 1), ("bias", 0)))
    flat = graph.node("Reshape", [graph.x, graph.constant("flat", np.array([0, 4, 15]))], [4, 15])
    norm = graph.node("GroupNormalization", [flat, ones, zeros], [4, 15], num_groups=2, epsilon=1e-3)
    turned = graph.node("Transpose", [norm], [15, 4], perm=(0, 2, 1))
    other = graph.node("ReduceSum", [norm, graph.constant("axes", np.array([1]))], [1, 15])
    graph.output(turned)
    graph.output(other)
    assert reason_of(graph) == "2 nodes read its result"


def test_a_reshape_that_flattens_something_else_stays(small: Any) -> None:
    graph = small((4, 3, 5))
    ones, zeros = (graph.constant(n, np.full(12, v, np.float32)) for n, v in (("scale", 1), ("bias", 0)))
    rows = graph.node("Reshape", [graph.x, graph.constant("flat", np.array([0, 12, 5]))], [12, 5])
    norm = graph.node("GroupNormalization", [rows, ones, zeros], [12, 5], num_groups=2, epsilon=1e-3)
    graph.output(graph.node("Transpose", [norm], [5, 12], perm=(0, 2, 1)))
    assert reason_of(graph) == "Reshape n0 does not flatten [B, C, H, W] to [B, C, H W]"


def test_a_norm_of_flattened_positions_is_turned_first(small: Any, run_graph: Any) -> None:
    graph = small((4, 3, 5))
    rng = np.random.default_rng(0)
    scale, bias = (graph.constant(n, rng.normal(size=4).astype(np.float32)) for n in ("scale", "bias"))
    flat = graph.node("Reshape", [graph.x, graph.constant("flat", np.array([0, 4, 15]))], [4, 15])
    norm = graph.node("GroupNormalization", [flat, scale, bias], [4, 15], num_groups=2, epsilon=1e-3)
    graph.output(graph.node("Transpose", [norm], [15, 4], perm=(0, 2, 1)))
    feeds = {"x": rng.normal(size=(2, 4, 3, 5)).astype(np.float32), "timestep": np.array([0, 1])}
    (expected,) = run_graph(graph.model, feeds, optimize=False).values()
    assert AttentionInput()(graph.model).modified
    (found,) = run_graph(graph.model, feeds, optimize=False).values()
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert [tuple(node.attributes["perm"].as_ints()) for node in graph.graph if node.op_type == "Transpose"] == [
        (0, 2, 3, 1)
    ]
