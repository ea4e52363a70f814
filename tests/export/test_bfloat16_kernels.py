"""Convolutions that a plan keeps in float multiply bfloat16 on OpenVINO: those, and only what they multiply."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from ml_dtypes import bfloat16
from numpy.typing import NDArray

from qdm_deploy.artifacts.plan import LayerPlan, QuantizationPlan
from qdm_deploy.backends.openvino.graph import compile_graph, import_openvino, read_graph
from qdm_deploy.runtime.cpu import cpu_flags
from qdm_export.passes.bfloat16_kernels import Bfloat16Kernels
from qdm_export.targets import FORMS, emit
from qdm_export.topology import layer_nodes

Array = NDArray[Any]


def in_float(plan: QuantizationPlan, names: list[str]) -> QuantizationPlan:
    layers = (LayerPlan(item.layer, "float", reason="kept") if item.name in names else item for item in plan.layers)
    return replace(plan, layers=tuple(layers))


def exact(x: Array, weight: Array, bias: Array | None) -> Array:
    """The convolution in float64."""
    given = [torch.from_numpy(values.astype(np.float64)) for values in (x, weight)]
    b = None if bias is None else torch.from_numpy(bias.astype(np.float64))
    return torch.nn.functional.conv2d(given[0], given[1], b, padding=1).numpy()


def rounded(values: Array) -> Array:
    return values.astype(bfloat16).astype(np.float32)


def run_openvino(model: ir.Model, feeds: dict[str, Array], path: Path) -> Array:
    pytest.importorskip("openvino")
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    onnx.save(proto, path)
    return run_graph_of(read_graph(path, cpu_flags()), feeds)


def run_graph_of(model: Any, feeds: dict[str, Array]) -> Array:
    # An input that only a cast read has the cast's name too, once the cast is gone.
    names = [next(name for name in sorted(item.names) if name in feeds) for item in model.inputs]
    model.reshape({name: list(feeds[name].shape) for name in names})  # as the session does
    compiled = compile_graph(import_openvino().Core(), model, {"INFERENCE_PRECISION_HINT": "f32"})
    result = compiled({name: feeds[name] for name in names})
    return next(iter(result.values()))


@pytest.mark.parametrize("bias", [True, False])
def test_a_product_is_of_rounded_factors_and_its_bias_is_not_rounded(small: Any, tmp_path: Path, bias: bool) -> None:
    graph = small((32, 9, 9))
    graph.output(graph.conv(out=16, bias=bias))
    if bias:
        graph.biases["conv"] *= 1000  # rounded, it would be off by 2
        value = graph.graph.initializers["conv.bias"]
        value.const_value = ir.tensor(graph.biases["conv"], name=value.name)
    assert Bfloat16Kernels(in_float(graph.plan, ["conv"]))(graph.model).modified
    shape = [int(size) for size in list(graph.x.shape)[1:]]
    x = np.random.default_rng(3).normal(size=(2, *shape)).astype(np.float32)
    found = run_openvino(graph.model, {"x": x, "timestep": np.array([0, 1])}, tmp_path / "graph.onnx")
    b = graph.biases["conv"]
    expected, plain = exact(rounded(x), rounded(graph.weights["conv"]), b), exact(x, graph.weights["conv"], b)
    # 2**-9 of the result, without its bias, is what it is rounded by once. Where the CPU has no bfloat16, nothing is.
    size = np.abs(expected - (0 if b is None else b.reshape(-1, 1, 1))).max()
    error, as_float = (np.abs(found - values).max() / size for values in (expected, plain))
    assert min(error, as_float) < 2**-8
    assert graph.model.graph.opset_imports[""] == 22


def test_a_cpu_with_bfloat16_really_multiplies_it(small: Any, tmp_path: Path) -> None:
    if "avx512_bf16" not in cpu_flags():
        pytest.skip("would show that products on this CPU are of rounded factors; it has no AVX512-BF16")
    graph = small((32, 9, 9))
    graph.output(graph.conv(out=16, bias=False))
    assert Bfloat16Kernels(in_float(graph.plan, ["conv"]))(graph.model).modified
    # 1 + 2**-9 rounds to 1: a float32 product would keep it.
    x = np.full((1, 32, 9, 9), 1 + 2**-9, np.float32)
    found = run_openvino(graph.model, {"x": x, "timestep": np.array([0])}, tmp_path / "graph.onnx")
    expected = rounded(exact(np.ones_like(x), rounded(graph.weights["conv"]), None).astype(np.float32))
    np.testing.assert_allclose(found, expected, atol=np.abs(expected).max() * 2**-9)


@pytest.mark.parametrize("name", ["labels", "rgb"])
def test_only_layers_that_might_be_int8_are_cast(tiny: Any, name: str) -> None:
    plan = tiny.plan(name)
    kept = [layer.name for layer in plan.quantized if layer.layer.kind == "conv"][:3]
    graph = emit(tiny.float_graph(name), in_float(plan, kept), "openvino").model
    cast = [
        layer.name
        for layer in layer_nodes(graph)
        if any(value is not None and value.dtype == ir.DataType.BFLOAT16 for value in layer.node.inputs)
    ]
    assert cast == kept
    assert graph.graph.opset_imports[""] == 22
    onnx.checker.check_model(ir.to_proto(graph), full_check=True)


def test_the_rest_of_the_graph_reads_float32(tiny: Any) -> None:
    plan = tiny.plan("labels")
    kept = [layer.name for layer in plan.quantized]
    graph = emit(tiny.float_graph("labels"), in_float(plan, kept), "openvino").model
    half = {value for node in graph.graph for value in node.outputs if value.dtype == ir.DataType.BFLOAT16}
    readers = {use.node.op_type for value in half for use in value.uses()}
    assert readers == {"Conv", "Cast"}
    # Shortcuts, whose kernel has one position, stay float32 too.
    shapes = [layer.layer.weight_shape for layer in plan.quantized if layer.layer.kind == "conv"]
    convolutions = sum(shape[2] > 1 for shape in shapes)
    assert 0 < convolutions < len(shapes)
    assert sum(node.op_type == "Cast" and node.outputs[0] in half for node in graph.graph) == convolutions


def test_other_targets_and_plans_that_keep_nothing_have_none(tiny: Any, emitted: Any) -> None:
    plan = tiny.plan("labels")
    assert plan.quantized[0].layer.kind == "conv"
    kept = in_float(plan, [plan.quantized[0].name])
    graphs = [
        emitted.graph("labels", "openvino"),
        emit(tiny.float_graph("labels"), kept, "onnxruntime").model,
        emit(tiny.float_graph("labels"), kept, "tensorrt").model,
        emit(tiny.float_graph("labels"), kept, "openvino", form=FORMS["openvino"].without(Bfloat16Kernels)).model,
    ]
    for graph in graphs:
        assert graph.graph.opset_imports[""] == 21
        assert all(value.dtype != ir.DataType.BFLOAT16 for node in graph.graph for value in node.outputs)


@pytest.mark.parametrize("kind", ["Gemm", "MatMul"])
def test_a_matrix_product_stays_float32(small: Any, kind: str) -> None:
    graph = small((32,))
    graph.output(graph.linear(kind=kind))
    assert not Bfloat16Kernels(in_float(graph.plan, ["linear"]))(graph.model).modified


def test_openvino_adds_no_bias_in_bfloat16_and_moves_no_result(tiny: Any, emitted: Any, tmp_path: Path) -> None:
    # In a graph with INT8 it takes casts for its own: it would round the bias, and round again what it is added to.
    pytest.importorskip("openvino")
    if "avx512_bf16" not in cpu_flags():
        pytest.skip("would show what OpenVINO makes of a bfloat16 convolution's bias; this CPU has no AVX512-BF16")
    plan, path, feeds = tiny.plan("labels"), tmp_path / "graph.onnx", emitted.feeds("labels", 2)
    kept = next(layer.name for layer in plan.quantized if layer.layer.kind == "conv")
    onnx.save(ir.to_proto(emit(tiny.float_graph("labels"), in_float(plan, [kept]), "openvino").model), path)
    model = read_graph(path, cpu_flags())
    model.reshape({item.any_name: list(feeds[item.any_name].shape) for item in model.inputs})
    compiled = compile_graph(import_openvino().Core(), model, {"INFERENCE_PRECISION_HINT": "f32"})
    nodes = compiled.get_runtime_model().get_ops()
    (product,) = (
        node
        for node in nodes
        if node.get_rt_info()["layerType"].astype(str) == "Convolution"
        and "bf16" in node.get_rt_info()["primitiveType"].astype(str)
    )
    assert [item.get_node().get_friendly_name() for item in product.input_values()] == [
        f"{kept}/bfloat16",
        f"{kept}/weight_bfloat16",
    ]
    readers = {item.get_node().get_rt_info()["layerType"].astype(str) for item in product.output(0).get_target_inputs()}
    assert readers == {"Subgraph"}


def test_running_it_again_changes_nothing(tiny: Any) -> None:
    plan = in_float(tiny.plan("labels"), [tiny.plan("labels").quantized[0].name])
    graph = emit(tiny.float_graph("labels"), plan, "openvino").model
    assert not Bfloat16Kernels(plan)(graph).modified


def halves(model: Any) -> int:
    half = import_openvino().Type.bf16
    return sum(item.get_element_type() == half for node in model.get_ops() for item in node.outputs())


def sqnr_db(expected: Array, found: Array) -> float:
    reference = expected.astype(np.float64)
    return float(10 * np.log10((reference**2).sum() / ((found - reference) ** 2).sum()))


def test_the_whole_graph_is_close_to_float32_with_and_without_bfloat16(
    tiny: Any, emitted: Any, tmp_path: Path, run_graph: Callable[..., dict[str, Array]]
) -> None:
    pytest.importorskip("openvino")
    plan = tiny.plan("labels")
    everything = in_float(plan, [layer.name for layer in plan.quantized])
    feeds, path = emitted.feeds("labels", 3, seed=11), tmp_path / "graph.onnx"
    expected = run_graph(tiny.float_graph("labels"), feeds)["next_sample"]
    onnx.save(ir.to_proto(emit(tiny.float_graph("labels"), everything, "openvino").model), path)
    for flag in ("avx512_bf16", "amx_bf16"):
        assert halves(read_graph(path, frozenset({"avx512f", flag}))) >= 3  # of a convolution: data, weight, result
    widened = read_graph(path, frozenset({"avx512f", "avx512_vnni"}))
    assert halves(widened) == 0
    assert sqnr_db(expected, run_graph_of(widened, feeds)) > 45  # only the weights are rounded there
    assert sqnr_db(expected, run_graph_of(read_graph(path, cpu_flags()), feeds)) > 35


class Refusing:
    """A core that cannot compile bfloat16, or anything at all."""

    def __init__(self, *, everything: bool) -> None:
        self.everything, self.core = everything, import_openvino().Core()

    def compile_model(self, model: Any, device: str, options: dict[str, Any]) -> Any:
        if self.everything or halves(model):
            raise RuntimeError("object is not initialized")
        return self.core.compile_model(model, device, options)


def test_what_openvino_cannot_compile_runs_in_float32(tiny: Any, emitted: Any, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    plan, path = tiny.plan("labels"), tmp_path / "graph.onnx"
    kept = in_float(plan, [layer.name for layer in plan.quantized if layer.layer.kind == "conv"])
    onnx.save(ir.to_proto(emit(tiny.float_graph("labels"), kept, "openvino").model), path)
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    for everything, flags in ((False, {"amx_bf16"}), (True, {"amx_bf16"}), (True, set[str]())):
        core, model = Refusing(everything=everything), read_graph(path, frozenset(flags))
        if everything:
            with pytest.raises(RuntimeError, match="object is not initialized"):
                compile_graph(core, model, options)
        else:
            names = {item.any_name for item in compile_graph(core, model, options).inputs}
            assert names == set(emitted.feeds("labels", 1))
