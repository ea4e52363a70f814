"""Checks of a written graph: valid ONNX, and integer kernels where the plan says so; what to compare layers by."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import checker, shape_inference

from qdm_deploy.artifacts.plan import QuantizationPlan
from qdm_deploy.errors import ExportError
from qdm_export.metadata import LAYER_KEY
from qdm_export.topology import LayerNode, layer_nodes

__all__ = [
    "INTEGER_OPERATORS",
    "Endpoints",
    "bytes_per_row",
    "check_onnx",
    "integer_kernels",
    "layer_endpoints",
    "widened",
    "with_outputs",
]

# ONNX Runtime's integer kernels for what a plan quantizes.
INTEGER_OPERATORS = ("QLinearConv", "QLinearMatMul", "MatMulIntegerToFloat", "QGemm")


def check_onnx(path: Path) -> None:
    """Refuse a graph that is not valid ONNX, or whose types and shapes do not fit together.

    Raises:
        ExportError: with the checker's own words.
    """
    try:
        checker.check_model(str(path))
        # Types and shapes are inferred without the weights, so a graph of any size is checked in memory.
        shape_inference.infer_shapes(onnx.load(str(path), load_external_data=False), check_type=True, strict_mode=True)
    except (checker.ValidationError, shape_inference.InferenceError) as error:
        raise ExportError(f"{path} is not a valid ONNX graph: {error}") from error


@dataclass(frozen=True)
class Endpoints:
    """Where a planned layer begins and ends in a target's graph: its float input, its result with gain and bias."""

    name: str
    data: str
    result: str


def layer_endpoints(model: ir.Model, plan: QuantizationPlan) -> tuple[Endpoints, ...]:
    """The values to compare a quantized layer by: everything the passes inserted lies between them."""
    nodes = {item.name: item for item in layer_nodes(model)}
    endpoints = []
    for layer in plan.quantized:
        item = nodes[layer.name]
        data: ir.Value | None = item.node.inputs[0]
        while (
            data is not None
            and (before := data.producer()) is not None
            and _inserted_for(before, layer.name, layer.layer.input_group)
        ):
            data = before.inputs[0]
        result = item.node.outputs[0]
        while (after := _only_reader(result)) is not None and (
            _inserted_for(after, layer.name) or _adds_bias(after, result, item)
        ):
            result = after.outputs[0]
        if data is None or data.name is None or result.name is None:
            raise ExportError(f"{layer.name} has no float input in the graph")
        endpoints.append(Endpoints(layer.name, data.name, result.name))
    return tuple(endpoints)


def bytes_per_row(model: ir.Model, plan: QuantizationPlan) -> int:
    """What the inputs and results of all quantized layers take together in float32, for one row of a batch."""
    nodes = {item.name: item for item in layer_nodes(model)}
    values = [value for layer in plan.quantized for value in (nodes[layer.name].data, nodes[layer.name].output)]
    # The batch is the only axis without a size.
    shapes = [[size for size in value.shape if isinstance(size, int)] for value in values if value.shape is not None]
    return sum(4 * math.prod(shape) for shape in shapes)


def with_outputs(model: ir.Model, names: Iterable[str]) -> ir.Model:
    """A copy of the graph that also returns these values."""
    model = model.clone()
    values = ir.convenience.create_value_mapping(model.graph)
    present = {value.name for value in (*model.graph.outputs, *model.graph.inputs)}
    for name in dict.fromkeys(names):
        if name not in present:
            model.graph.outputs.append(values[name])
    return model


def widened(path: Path) -> ir.Model:
    """A written graph with float32 for bfloat16, of the same constants: for runtimes that compile no bfloat16."""
    model = ir.load(path)
    graph = model.graph
    for value in (*graph.initializers.values(), *(value for node in graph for value in node.outputs)):
        if value.dtype != ir.DataType.BFLOAT16:
            continue
        if value.const_value is not None:
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float32), name=value.name)
        value.type = ir.TensorType(ir.DataType.FLOAT)
    for node in graph:
        if node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.BFLOAT16:
            node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT))
    return model


def integer_kernels(optimized: Path) -> Counter[str]:
    """How often each integer operator occurs in a graph that ONNX Runtime optimized."""
    graph = onnx.load(str(optimized), load_external_data=False).graph
    return Counter(node.op_type for node in graph.node if node.op_type in INTEGER_OPERATORS)


def _inserted_for(node: ir.Node, *layers: str) -> bool:
    return node.metadata_props.get(LAYER_KEY) in layers


def _only_reader(value: ir.Value) -> ir.Node | None:
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 else None


def _adds_bias(node: ir.Node, value: ir.Value, item: LayerNode) -> bool:
    """The Add of a MatMul's own bias, which stands behind what was inserted."""
    if item.node.op_type != "MatMul" or node.op_type != "Add" or node.metadata_props != item.node.metadata_props:
        return False
    return any(other is not None and other is not value and other.is_initializer() for other in node.inputs)
