"""SiLU as a ratio of polynomials: how exact it is, and which SiLUs become one."""

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx_ir.passes import common

from qdm_export.passes.bfloat16_kernels import Bfloat16Kernels
from qdm_export.passes.rational_silu import LIMIT, RationalSilu
from qdm_export.targets import FORMS, emit


def silu_graph(small: Any, shape: tuple[int, ...]) -> Any:
    graph = small(shape)
    gate = graph.node("Sigmoid", [graph.x], shape)
    graph.output(graph.node("Mul", [graph.x, gate], shape))
    return graph


def silu(x: NDArray[Any]) -> NDArray[np.float64]:
    wide = x.astype(np.float64)
    result: NDArray[np.float64] = wide * np.exp(np.minimum(wide, 0)) / (1 + np.exp(-np.abs(wide)))
    return result


def computed(small: Any, run_graph: Any, x: NDArray[np.float32]) -> NDArray[np.float32]:
    graph = silu_graph(small, x.shape[1:])
    assert RationalSilu()(graph.model).modified
    common.RemoveUnusedNodesPass()(graph.model)
    assert {node.op_type for node in graph.model.graph} == {"Clip", "Mul", "Add", "Div", "Identity"}
    assert not RationalSilu()(graph.model).modified
    timestep = np.zeros(len(x), dtype=np.int64)
    (found,) = run_graph(graph.model, {"x": x, "timestep": timestep}, optimize=False).values()
    return np.asarray(found)


def test_it_is_off_by_no_more_than_it_says(small: Any, run_graph: Any) -> None:
    x = np.linspace(-2 * LIMIT, 2 * LIMIT, 400_000, dtype=np.float32).reshape(1, 4, 100, 1000)
    error = np.abs(computed(small, run_graph, x) - silu(x))
    assert error.max() < 1.3e-5
    assert error[np.abs(x) < 4].max() < 5e-6  # where nearly all of a normalized tensor is


def test_it_ends_at_zero_and_at_the_value_itself(small: Any, run_graph: Any) -> None:
    x = np.array([-3e4, -500, -LIMIT, 0, LIMIT, 500, 3e4], dtype=np.float32).reshape(1, 7, 1, 1)
    found = computed(small, run_graph, x)
    # The held value divides to 1/2 within a rounding of it, which a large value multiplies.
    assert (np.abs(found - silu(x)) <= 2e-7 * np.abs(x) + 1.3e-5).all()


def test_that_of_a_vector_stays(small: Any) -> None:
    graph = silu_graph(small, (7,))
    assert not RationalSilu()(graph.model).modified


@pytest.mark.parametrize("name", ["labels", "rgb", "text", "variance"])
def test_openvino_has_it_behind_every_norm_and_the_graph_computes_the_same(
    tiny: Any, emitted: Any, run_graph: Any, name: str
) -> None:
    exact = FORMS["openvino"].without(RationalSilu, Bfloat16Kernels)
    plan = tiny.plan(name)
    nothing = replace(plan, layers=tuple(replace(layer, precision="float") for layer in plan.layers))
    rational = FORMS["openvino"].without(Bfloat16Kernels)
    graphs = [emit(tiny.float_graph(name), nothing, "openvino", form=form).model for form in (exact, rational)]
    before, after = (Counter(node.op_type for node in graph.graph) for graph in graphs)
    assert after["Sigmoid"] < before["Sigmoid"]
    assert after["Clip"] - before["Clip"] == before["Sigmoid"] - after["Sigmoid"]
    # What is left belongs to the time embedding.
    for node in graphs[1].graph:
        if node.op_type == "Sigmoid":
            assert len(node.outputs[0].shape) == 2
    onnx.checker.check_model(ir.to_proto(graphs[1]), full_check=True)
    feeds = emitted.feeds(name, 3)
    expected, found = (run_graph(graph, feeds) for graph in graphs)
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, atol=2e-4)
    assert any((found[key] != value).any() for key, value in expected.items())
