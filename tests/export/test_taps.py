"""A convolution with few output channels tap by tap: the same sums, for any kernel and padding, and nothing else."""

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qdm_export.passes.taps import Taps
from qdm_export.targets import FORMS, emit
from qdm_export.topology import PHASE_KEY, layer_nodes


def conv_graph(small: Any, weight: tuple[int, ...], *, bias: bool = True, **attributes: Any) -> Any:
    """A graph of one float convolution over as many channels as its weight and groups say."""
    rng = np.random.default_rng(0)
    graph = small((weight[1] * attributes.get("group", 1), 9, 7))
    operands = [graph.x, graph.constant("weight", rng.normal(size=weight).astype(np.float32))]
    if bias:
        operands.append(graph.constant("bias", rng.normal(size=weight[0]).astype(np.float32)))
    pads, stride, dilation = (
        attributes.get("pads", [0] * 4),
        attributes.get("strides", [1])[0],
        attributes.get("dilations", [1])[0],
    )
    spatial = [
        (size + pads[axis] + pads[axis + 2] - dilation * (weight[2 + axis] - 1) - 1) // stride + 1
        for axis, size in enumerate((9, 7))
    ]
    graph.output(graph.node("Conv", operands, [weight[0], *spatial], module="conv_out", **attributes))
    return graph


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("weight", "attributes"),
    [
        ((1, 64, 3, 3), {"pads": [1, 1, 1, 1]}),
        ((3, 16, 3, 3), {"pads": [1, 1, 1, 1]}),
        ((4, 20, 3, 5), {"pads": [0, 2, 1, 1]}),
        ((2, 16, 3, 3), {}),
    ],
)
def test_the_sums_are_those_of_the_convolution(
    small: Any, run_graph: Any, weight: tuple[int, ...], attributes: dict[str, Any], bias: bool
) -> None:
    graph = conv_graph(small, weight, bias=bias, **attributes)
    x = np.random.default_rng(3).normal(size=(3, weight[1], 9, 7)).astype(np.float32)
    feeds = {"x": x, "timestep": np.zeros(3, dtype=np.int64)}
    (expected,) = run_graph(graph.model, feeds).values()
    assert Taps()(graph.model).modified
    kernels = [node for node in graph.model.graph if node.op_type == "Conv"]
    assert [PHASE_KEY in node.metadata_props for node in kernels] == [False, True, True]
    assert [layer.name for layer in layer_nodes(graph.model)] == ["conv_out"]
    onnx.checker.check_model(ir.to_proto(graph.model), full_check=True)
    (found,) = run_graph(graph.model, feeds).values()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)
    assert not Taps()(graph.model).modified


@pytest.mark.parametrize(
    ("weight", "attributes"),
    [
        ((5, 16, 3, 3), {}),
        ((4, 15, 3, 3), {}),
        ((4, 16, 1, 1), {}),
        ((4, 16, 3, 3), {"strides": [2, 2]}),
        ((4, 16, 3, 3), {"dilations": [2, 2]}),
        ((4, 16, 3, 3), {"group": 2}),
    ],
)
def test_others_are_left_alone(small: Any, weight: tuple[int, ...], attributes: dict[str, Any]) -> None:
    assert not Taps()(conv_graph(small, weight, **attributes).model).modified


@pytest.mark.parametrize("name", ["labels", "rgb", "variance"])
def test_openvinos_last_convolution_goes_tap_by_tap(tiny: Any, emitted: Any, run_graph: Any, name: str) -> None:
    plan = tiny.plan(name)
    nothing = replace(plan, layers=tuple(replace(layer, precision="float") for layer in plan.layers))
    whole = replace(FORMS["openvino"], taps=False, bfloat16_kernels=False)
    graphs = [
        emit(tiny.float_graph(name), nothing, "openvino", form=form) for form in (whole, replace(whole, taps=True))
    ]
    outputs, inputs, *_ = plan.layers[-1].layer.weight_shape
    few = outputs <= 4 and inputs >= 16
    assert few == (name != "rgb")
    parts = [node for node in graphs[1].graph if PHASE_KEY in node.metadata_props]
    assert len(parts) == (2 if few else 0)
    assert [item.name for item in layer_nodes(graphs[1])] == [item.name for item in layer_nodes(graphs[0])]
    feeds = emitted.feeds(name, 3)
    expected, found = (run_graph(graph, feeds) for graph in graphs)
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, atol=1e-4)
