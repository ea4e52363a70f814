"""GroupNormalization in the forms that the targets run fastest: the same function, whatever the mean is."""

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx_ir.passes import common

from qdm_export.passes.group_norm import GroupNormForm
from qdm_export.passes.instance_norm import InstanceNormForm
from qdm_export.passes.moments_norm import MomentsNormForm

Array = NDArray[Any]


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def feeds(graph: Any) -> dict[str, Array]:
    shape = [int(size) for size in list(graph.x.shape)[1:]]
    x = np.random.default_rng(8).normal(size=(3, *shape)).astype(np.float32) * 3
    return {"x": x, "timestep": np.array([0, 399, 400])}


def group_norm(x: Array, groups: int, scale: Array, bias: Array, epsilon: float) -> Array:
    rows = x.astype(np.float64).reshape(len(x), groups, -1)
    normal = (rows - rows.mean(-1, keepdims=True)) / np.sqrt(rows.var(-1, keepdims=True) + epsilon)
    per_channel = (1, -1, *([1] * (x.ndim - 2)))
    return normal.reshape(x.shape) * scale.reshape(per_channel) + bias.reshape(per_channel)


FORMS = pytest.mark.parametrize("form", [InstanceNormForm, MomentsNormForm])


@FORMS
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("shape", [(4, 6, 5), (4, 7)])
def test_norm_forms_are_the_group_norm(
    small: Any, run_graph: Any, groups: int, shape: tuple[int, ...], form: type[GroupNormForm]
) -> None:
    graph = small(shape)
    rng = np.random.default_rng(0)
    scale, bias = (graph.constant(n, rng.normal(size=4).astype(np.float32)) for n in ("scale", "bias"))
    norm = graph.node("GroupNormalization", [graph.x, scale, bias], shape, num_groups=groups, epsilon=1e-3)
    graph.output(norm)
    given = feeds(graph)
    # Squares of 1000 leave float32 no digit behind the point. Moments come from sums of squares: a mean of 30 times the
    # spread still leaves them four digits.
    given["x"][1] += 100 if form is MomentsNormForm else 1000
    assert form()(graph.model).modified
    (found,) = run_graph(graph.model, given, optimize=False).values()
    expected = group_norm(given["x"], groups, scale.const_value.numpy(), bias.const_value.numpy(), 1e-3)
    np.testing.assert_allclose(found[[0, 2]], expected[[0, 2]], atol=1e-5)
    np.testing.assert_allclose(found[1], expected[1], atol=2e-3)  # x itself has steps of 6e-5 up there
    assert "GroupNormalization" not in operators(graph.model)
    assert not form()(graph.model).modified


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("read_elsewhere", [True, False])
def test_moments_take_what_is_added_to_a_whole_channel_into_the_mean(
    small: Any, run_graph: Any, first: bool, read_elsewhere: bool
) -> None:
    graph = small((4, 6, 5))
    rng = np.random.default_rng(0)
    scale, bias = (graph.constant(n, rng.normal(size=4).astype(np.float32)) for n in ("scale", "bias"))
    shift = graph.node("ReduceMax", [graph.x, graph.constant("axes", np.array([2, 3]))], [4, 1, 1])
    total = graph.node("Add", [shift, graph.x] if first else [graph.x, shift], [4, 6, 5])
    norm = graph.node("GroupNormalization", [total, scale, bias], [4, 6, 5], num_groups=2, epsilon=1e-3)
    graph.output(graph.node("Add", [norm, total], [4, 6, 5]) if read_elsewhere else norm)
    given = feeds(graph)
    sums = given["x"] + given["x"].max((2, 3), keepdims=True)
    expected = group_norm(sums, 2, scale.const_value.numpy(), bias.const_value.numpy(), 1e-3)
    assert MomentsNormForm()(graph.model).modified
    common.RemoveUnusedNodesPass()(graph.model)
    (found,) = run_graph(graph.model, given, optimize=False).values()
    np.testing.assert_allclose(found, expected + sums * read_elsewhere, atol=1e-5)
    assert (total.producer() in list(graph.graph)) == read_elsewhere


def test_a_norm_of_one_position_keeps_its_add(small: Any, run_graph: Any) -> None:
    graph = small((4, 1, 1))
    ones, zeros = graph.constant("scale", np.ones(4, np.float32)), graph.constant("bias", np.zeros(4, np.float32))
    total = graph.node("Add", [graph.x, graph.x], [4, 1, 1])
    graph.output(graph.node("GroupNormalization", [total, ones, zeros], [4, 1, 1], num_groups=2, epsilon=1e-3))
    MomentsNormForm()(graph.model)
    assert total.producer() in list(graph.graph)
    (found,) = run_graph(graph.model, given := feeds(graph), optimize=False).values()
    np.testing.assert_allclose(found, group_norm(2 * given["x"], 2, np.ones(4), np.zeros(4), 1e-3), atol=1e-5)
