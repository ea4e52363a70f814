"""Projections of one vector as one matrix product: the same numbers, and nothing else is touched."""

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qdm_export.passes.joint_projections import JointProjections
from qdm_export.targets import FORMS, emit


def projections(small: Any, *sizes: int, **attributes: float) -> Any:
    """A Gemm of the input for each size, each with an output of the graph."""
    rng = np.random.default_rng(0)
    graph = small((6,))
    for number, size in enumerate(sizes):
        shape = (size, 6) if attributes.get("transB", 1) else (6, size)
        weight = graph.constant(f"weight_{number}", rng.normal(size=shape).astype(np.float32))
        bias = graph.constant(f"bias_{number}", rng.normal(size=size).astype(np.float32))
        graph.output(graph.node("Gemm", [graph.x, weight, bias], [size], **{"transB": 1, **attributes}))
    return graph


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def test_they_become_one_product_and_a_split(small: Any, run_graph: Any) -> None:
    graph = projections(small, 3, 5, 1)
    feeds = {"x": np.random.default_rng(1).normal(size=(4, 6)).astype(np.float32), "timestep": np.zeros(4, np.int64)}
    expected = run_graph(graph.model, feeds)
    assert JointProjections()(graph.model).modified
    assert operators(graph.model) == ["Concat", "Concat", "Gemm", "Split", *["Identity"] * 3]
    onnx.checker.check_model(ir.to_proto(graph.model), full_check=True)
    found = run_graph(graph.model, feeds)
    assert [value.shape for value in found.values()] == [(4, 3), (4, 5), (4, 1)]
    for one, other in zip(found.values(), expected.values(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)
    assert not JointProjections()(graph.model).modified


@pytest.mark.parametrize("attributes", [{"transB": 0}, {"alpha": 2.0}, {"beta": 0.5}])
def test_other_products_are_left_alone(small: Any, attributes: dict[str, float]) -> None:
    assert not JointProjections()(projections(small, 3, 5, **attributes).model).modified


def test_one_alone_stays(small: Any) -> None:
    assert not JointProjections()(projections(small, 3).model).modified


def test_weights_that_are_computed_are_left_alone(small: Any) -> None:
    graph = small((6,))
    bias = graph.constant("bias", np.zeros(6, np.float32))
    for _ in range(2):
        weight = graph.node("MatMul", [graph.x, graph.x], [6])
        graph.output(graph.node("Gemm", [graph.x, weight, bias], [6], transB=1))
    assert not JointProjections()(graph.model).modified


@pytest.mark.parametrize("name", ["labels", "rgb"])
def test_openvinos_blocks_share_a_projection(tiny: Any, emitted: Any, run_graph: Any, name: str) -> None:
    plan = tiny.plan(name)
    apart = emit(tiny.float_graph(name), plan, "openvino", form=replace(FORMS["openvino"], joint_projections=False))
    joint = emitted.graph(name, "openvino")
    blocks = operators(apart).count("Gemm") - operators(joint).count("Gemm") + 1
    (split,) = [node for node in joint.graph if node.name is not None and node.name.endswith("/parts")]
    assert len(split.outputs) == blocks > 1
    feeds = emitted.feeds(name, 3)
    for one, other in zip(run_graph(joint, feeds).values(), run_graph(apart, feeds).values(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3)
