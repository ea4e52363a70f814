"""Linear layers over an image's positions as convolutions: the same numbers, the same codes, the faster kernel."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qdm_deploy.runtime.cpu import cpu_flags
from qdm_deploy.runtime.openvino_graph import compile_graph, import_openvino, read_graph
from qdm_export.check import check_onnx, layer_endpoints
from qdm_export.passes.base import values_of
from qdm_export.passes.pointwise_convolutions import PointwiseConvolutions
from qdm_export.targets import FORMS, emit
from qdm_export.topology import layer_nodes


def as_products(tiny: Any, name: str, **options: Any) -> ir.Model:
    form = replace(FORMS["openvino"], pointwise=False)
    return emit(tiny.float_graph(name), tiny.plan(name, **options), "openvino", form=form)


def linear_layers(tiny: Any, name: str) -> set[str]:
    return {layer.name for layer in tiny.plan(name).quantized if layer.layer.kind == "linear"}


def kinds(model: ir.Model, names: set[str]) -> Counter[str]:
    return Counter(node.op_type for node in model.graph if node.name in names)


@pytest.mark.parametrize("name", ["labels", "text"])
def test_int8_layers_over_an_image_are_convolutions_and_others_stay(tiny: Any, emitted: Any, name: str) -> None:
    quantized, found = linear_layers(tiny, name), emitted.graph(name, "openvino")
    assert quantized
    assert kinds(as_products(tiny, name), quantized) == {"MatMul": len(quantized)}
    assert kinds(found, quantized) == {"Conv": len(quantized)}
    others = {layer.name for layer in tiny.topology(name).layers if layer.kind == "linear"} - quantized
    assert others <= {layer.name for layer in layer_nodes(found) if layer.kind == "linear"}
    assert not PointwiseConvolutions(tiny.plan(name))(found.clone()).modified


def test_rows_that_are_no_image_stay_rows(tiny: Any) -> None:
    model, plan = as_products(tiny, "labels"), tiny.plan("labels")
    for layer in layer_nodes(model):  # an image of one row, whose turning the plugin would not see through
        if layer.kind == "conv":
            layer.data.shape = ir.Shape([None, None, 1, 25])
    assert PointwiseConvolutions(plan)(model).modified is False


@pytest.mark.parametrize(("name", "bits"), [("labels", 8), ("text", 8), ("text", 4)])
def test_the_numbers_are_the_same(
    tiny: Any, emitted: Any, run_graph: Any, tmp_path: Path, name: str, bits: int
) -> None:
    feeds, found = emitted.feeds(name, 3), emit(tiny.float_graph(name), tiny.plan(name, weight_bits=bits), "openvino")
    expected = run_graph(as_products(tiny, name, weight_bits=bits), feeds, optimize=False)
    for key, value in run_graph(found, feeds, optimize=False).items():
        np.testing.assert_allclose(value, expected[key], atol=1e-5)
    onnx.save(ir.to_proto(found), tmp_path / "found.onnx")
    check_onnx(tmp_path / "found.onnx")


def test_the_codes_are_those_of_the_other_targets(tiny: Any, emitted: Any) -> None:
    def codes(target: str) -> dict[str, ir.Value]:
        values = emitted.graph("labels", target).graph.initializers
        return {name: values[f"{name}/weight_codes"] for name in linear_layers(tiny, "labels")}

    for name, value in codes("tensorrt").items():
        np.testing.assert_array_equal(values_of(codes("openvino")[name]), values_of(value))


def test_layers_are_compared_on_rows_as_before(tiny: Any, emitted: Any) -> None:
    plan = tiny.plan("labels")
    graph = emitted.graph("labels", "openvino")
    shapes = {value.name: value.shape for node in graph.graph for value in node.outputs}
    compared = [ends for ends in layer_endpoints(graph, plan) if ends.name in linear_layers(tiny, "labels")]
    assert {len(shapes[ends.data]) for ends in compared} == {len(shapes[ends.result]) for ends in compared} == {3}
    assert [ends.data for ends in layer_endpoints(graph, plan)] == [
        ends.data for ends in layer_endpoints(as_products(tiny, "labels"), plan)
    ]


@pytest.mark.parametrize("bits", [8, 4])
def test_openvino_runs_integer_convolutions_and_moves_nothing(
    tiny: Any, emitted: Any, tmp_path: Path, bits: int
) -> None:
    pytest.importorskip("openvino")
    if "avx512f" not in cpu_flags():
        pytest.skip("would show which kernels OpenVINO takes with AVX-512; this CPU has none")
    plan = tiny.plan("labels", weight_bits=bits)
    feeds, every = emitted.feeds("labels", 2), linear_layers(tiny, "labels")
    before = executed(as_products(tiny, "labels", weight_bits=bits), feeds, tmp_path / "before.onnx")
    after = executed(emit(tiny.float_graph("labels"), plan, "openvino"), feeds, tmp_path / "after.onnx")
    of_layers = [kind for name, kind in after if name.removesuffix("/WithoutBiases") in every]
    assert len(of_layers) == len(every)
    assert all(kind.startswith("Convolution") and kind.endswith("I8") for kind in of_layers)

    def moves(nodes: list[tuple[str, str]]) -> int:
        return sum(kind.startswith(("Transpose", "Reorder")) for _, kind in nodes)

    assert moves(after) <= moves(before)
    assert len(after) < len(before)  # a quantize joins what is in front of it


def executed(model: ir.Model, feeds: dict[str, Any], path: Path) -> list[tuple[str, str]]:
    onnx.save(ir.to_proto(model), path)
    read = read_graph(path, cpu_flags())
    read.reshape({item.any_name: list(feeds[item.any_name].shape) for item in read.inputs})
    options = {"INFERENCE_PRECISION_HINT": "f32", "PERF_COUNT": True}
    request = compile_graph(import_openvino().Core(), read, options).create_infer_request()
    request.infer({item.any_name: feeds[item.any_name] for item in read.inputs})
    return [
        (node.node_name, f"{node.node_type} {node.exec_type}")
        for node in request.profiling_info
        if node.status.name == "EXECUTED"
    ]
