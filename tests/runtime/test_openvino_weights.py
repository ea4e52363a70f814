"""Weights that a bfloat16 rest on OpenVINO must not round."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qdm_deploy.artifacts.plan import LayerPlan
from qdm_deploy.backends.openvino.graph import compile_graph, import_openvino, multiplies_bfloat16, read_graph
from qdm_deploy.backends.openvino.precision import keep_float32
from qdm_deploy.backends.openvino.weights import has_no_positions, keep_weights_exact
from qdm_deploy.metrics.error import sqnr_db
from qdm_deploy.runtime.cpu import cpu_flags
from qdm_deploy.samplers.random_inputs import random_inputs
from qdm_export.targets import emit

Build = Callable[[Any, Any], Any]
ROWS, CHANNELS, SIDE = 2, 8, 4


@pytest.fixture
def graph(tiny: Any, tmp_path: Path) -> Path:
    """A U-Net with labels and shortcuts, nothing in INT8."""
    plan = tiny.plan("labels")
    floating = replace(plan, layers=tuple(LayerPlan(item.layer, "float", "a float graph") for item in plan.layers))
    ir.save(emit(tiny.float_graph("labels"), floating, "openvino").model, tmp_path / "graph.onnx")
    return tmp_path / "graph.onnx"


def exact(graph: Path) -> Any:
    model = read_graph(graph, frozenset())
    assert keep_weights_exact(model) > 4
    return model


def run(model: Any, inputs: dict[str, Any], precision: str = "f32") -> Any:
    model.reshape({item.any_name: list(inputs[item.any_name].shape) for item in model.inputs})
    options = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": 1, "PERF_COUNT": True}
    request = compile_graph(import_openvino().Core(), model, options).create_infer_request()
    request.infer({item.any_name: inputs[item.any_name] for item in model.inputs})
    return request


def weights(model: Any) -> dict[str, Any]:
    """Of float convolutions of one position, by name."""
    return {
        node.get_friendly_name(): node.input_value(1).get_node().data
        for node in model.get_ops()
        if node.get_type_name() == "Convolution" and node.input_value(1).get_node().get_type_name() == "Constant"
        if list(node.input_value(1).get_shape())[2:] == [1, 1]
    }


def test_float32_gives_what_it_gave(tiny: Any, graph: Path) -> None:
    inputs = random_inputs(tiny.checkpoint("labels").denoiser, 3)
    before = run(read_graph(graph, frozenset()), inputs).get_tensor("next_sample").data
    after = run(exact(graph), inputs).get_tensor("next_sample").data
    assert sqnr_db(before, after) > 100


def test_shortcuts_lose_nothing_and_embeddings_are_convolutions(graph: Path) -> None:
    before, model = read_graph(graph, frozenset()), exact(graph)
    given, made = weights(before), weights(model)
    assert len(given) > 0
    for name, weight in given.items():
        np.testing.assert_array_equal(made[name] + made[f"{name}/rest"], weight)
        assert not (made[name].view(np.uint32) & 0xFFFF).any()  # bfloat16's own values
        assert np.abs(made[f"{name}/rest"]).max() <= 2**-7 * np.abs(weight).max()  # OpenVINO cuts digits off
    products = [node for node in before.get_ops() if node.get_type_name() == "MatMul" and has_no_positions(node)]
    assert len(products) > 4
    assert not any(node.get_type_name() == "MatMul" and has_no_positions(node) for node in model.get_ops())
    assert {node.get_friendly_name() for node in products} <= set(made)


@pytest.mark.skipif(
    not multiplies_bfloat16(cpu_flags()),
    reason="this CPU has no instructions for bfloat16; would have shown which kernels run in float32",
)
def test_embeddings_run_in_float32_and_shortcuts_in_bfloat16(tiny: Any, graph: Path) -> None:
    model = exact(graph)
    shortcuts = [name for name in weights(model) if f"{name}/rest" in weights(model)]
    embeddings = set(weights(model)).difference(shortcuts, [f"{name}/rest" for name in shortcuts])
    keep_float32(model)
    request = run(model, random_inputs(tiny.checkpoint("labels").denoiser, 3), "bf16")
    kernels = {item.node_name: item.exec_type for item in request.profiling_info}
    assert {kernels[name].rpartition("_")[2] for name in embeddings} == {"f32"}
    assert {kernels[name].rpartition("_")[2] for name in shortcuts} == {"bf16"}


def alone(opset: Any, shortcut: Any) -> Any:
    return opset.sigmoid(shortcut)


def biased(opset: Any, shortcut: Any) -> Any:
    return opset.sigmoid(opset.add(shortcut, opset.constant(np.ones((1, CHANNELS, 1, 1), np.float32))))


def in_a_block(opset: Any, shortcut: Any) -> Any:
    total = opset.add(
        opset.add(shortcut, opset.constant(np.ones((1, CHANNELS, 1, 1), np.float32))), opset.sin(shortcut)
    )
    return opset.sigmoid(total)


def summed_with_itself(opset: Any, shortcut: Any) -> Any:
    bias = opset.add(shortcut, opset.constant(np.ones((1, CHANNELS, 1, 1), np.float32)))
    return opset.sigmoid(opset.add(bias, bias))


@pytest.mark.parametrize("build", [alone, biased, in_a_block, summed_with_itself])
def test_whatever_reads_a_shortcut_gets_all_of_it(build: Build) -> None:
    openvino = pytest.importorskip("openvino")
    opset, generator = openvino.opset13, np.random.default_rng(4)
    data = opset.parameter([-1, CHANNELS, SIDE, SIDE], np.float32, "x")
    data.output(0).set_names({"x"})
    weight = generator.normal(size=(CHANNELS, CHANNELS, 1, 1)).astype(np.float32)
    shortcut = opset.convolution(data, opset.constant(weight), [1, 1], [0, 0], [0, 0], [1, 1])
    model = openvino.Model([opset.result(build(opset, shortcut))], [data], "shortcut")
    inputs = {"x": generator.normal(size=(ROWS, CHANNELS, SIDE, SIDE)).astype(np.float32)}
    before = run(model.clone(), inputs).get_output_tensor(0).data
    assert keep_weights_exact(model) == 1
    after = run(model, inputs).get_output_tensor(0).data
    assert sqnr_db(before, after) > 100
