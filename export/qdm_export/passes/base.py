"""What every pass shares: it runs once per graph, and inserts nodes that can be traced to their layer."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qdm_deploy.artifacts.plan import LayerPlan, QuantizationPlan
from qdm_deploy.errors import ExportError
from qdm_export.topology import LayerNode, layer_nodes

__all__ = [
    "PlanPass",
    "add_before",
    "cast",
    "constant",
    "graph_of",
    "insert_after",
    "insert_before",
    "layer_groups",
    "named_node",
    "values_of",
    "whole_timestep",
]

_APPLIED = "qdm.passes"


class PlanPass(ir.passes.InPlacePass):
    """Applies one part of a plan to a graph, in place; running it twice changes nothing the second time."""

    def __init__(self, plan: QuantizationPlan) -> None:
        """Apply decisions of ``plan``."""
        super().__init__()
        self.plan = plan

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite ``model`` unless this pass already has."""
        applied = model.metadata_props.get(_APPLIED, "").split()
        if type(self).__name__ in applied:
            return ir.passes.PassResult(model, modified=False)
        modified = self.rewrite(model, self._planned(model))
        model.metadata_props[_APPLIED] = " ".join([*applied, type(self).__name__])
        return ir.passes.PassResult(model, modified=modified)

    def rewrite(self, model: ir.Model, layers: Sequence[tuple[LayerPlan, LayerNode]]) -> bool:
        """Change the graph; ``layers`` are the INT8 layers with their nodes. Returns whether anything changed."""
        raise NotImplementedError

    def _planned(self, model: ir.Model) -> list[tuple[LayerPlan, LayerNode]]:
        nodes = {item.name: item for item in layer_nodes(model)}
        missing = [plan.name for plan in self.plan.layers if plan.name not in nodes]
        if missing:
            raise ExportError(
                f"the plan is not of this graph: {len(missing)} of its layers are not in it (first: {missing[0]})"
            )
        return [(plan, nodes[plan.name]) for plan in self.plan.quantized]


def layer_groups(layers: Sequence[tuple[LayerPlan, LayerNode]]) -> list[list[tuple[LayerPlan, LayerNode]]]:
    """The layers by the input tensor they share, in execution order."""
    groups: dict[str, list[tuple[LayerPlan, LayerNode]]] = {}
    for plan, node in layers:
        groups.setdefault(plan.layer.input_group, []).append((plan, node))
    return list(groups.values())


def values_of(value: ir.Value) -> NDArray[Any]:
    """The numbers of a constant.

    Raises:
        ExportError: it is not one.
    """
    if value.const_value is None:
        raise ExportError(f"{value.name} is not a constant of the graph")
    return value.const_value.numpy()


def whole_timestep(model: ir.Model) -> ir.Value:
    """The timestep of each row as an index of tables over T, [B] int64: rounded down where it lies between two.

    Raises:
        ExportError: the graph has no timestep.
    """
    timestep = next((value for value in model.graph.inputs if value.name == "timestep"), None)
    if timestep is None:
        raise ExportError("the graph has no timestep input to look anything up by")
    if timestep.dtype == ir.DataType.INT64:
        return timestep
    known = next((node.outputs[0] for node in model.graph if node.name == "whole_timestep"), None)
    if known is not None:
        return known
    output = ir.Value(name="whole_timestep", shape=timestep.shape, type=ir.TensorType(ir.DataType.INT64))
    # Timesteps are not negative, so that a cast rounds down.
    attributes = {"to": int(ir.DataType.INT64)}
    node = ir.node("Cast", [timestep], attributes, outputs=[output], name="whole_timestep")
    model.graph.insert_before(model.graph[0], node)
    return output


def constant(model: ir.Model, name: str, values: NDArray[Any] | np.generic) -> ir.Value:
    """The initializer ``name`` with these values, added if the graph has none of that name."""
    if name in model.graph.initializers:
        return model.graph.initializers[name]
    tensor = ir.tensor(np.array(values, order="C"), name=name)
    value = ir.Value(name=name, shape=ir.Shape(values.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.register_initializer(value)
    return value


def insert_before(
    layer: LayerNode, op_type: str, operands: Sequence[ir.Value], label: str, **attributes: Any
) -> ir.Node:
    """A node that takes the layer's data input and ``operands``; the caller wires its output."""
    node = named_node(layer, op_type, [layer.node.inputs[0], *operands], label, attributes)
    graph_of(layer.node).insert_before(layer.node, node)
    return node


def insert_after(
    layer: LayerNode, op_type: str, operands: Sequence[ir.Value], label: str, **attributes: Any
) -> ir.Node:
    """A node between the kernel's output and everything that read it."""
    output = layer.node.outputs[0]
    readers = list(output.uses())
    node = named_node(layer, op_type, [output, *operands], label, attributes)
    node.outputs[0].shape = output.shape
    graph_of(layer.node).insert_after(layer.node, node)
    for reader in readers:
        reader.node.replace_input_with(reader.idx, node.outputs[0])
    return node


def named_node(
    layer: LayerNode, op_type: str, inputs: Sequence[ir.Value | None], label: str, attributes: dict[str, Any]
) -> ir.Node:
    """A node that can be traced to its layer, in no graph yet; its output has the shape of its first input."""
    name = f"{layer.name}/{label}"
    output = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT))
    first = inputs[0]
    output.shape = None if first is None else first.shape
    return ir.node(
        op_type, inputs, attributes, outputs=[output], name=name, metadata_props=dict(layer.node.metadata_props)
    )


def add_before(
    node: ir.Node, op_type: str, inputs: Sequence[ir.Value], label: str, shape: ir.Shape | None, **attributes: Any
) -> ir.Value:
    """A float32 value from a new node before ``node``, named after it and traced to the same module."""
    name = f"{node.name}/{label}"
    output = ir.Value(name=name, shape=shape, type=ir.TensorType(ir.DataType.FLOAT))
    properties = dict(node.metadata_props)
    made = ir.node(op_type, inputs, attributes, outputs=[output], name=name, metadata_props=properties)
    graph_of(node).insert_before(node, made)
    return output


def cast(node: ir.Node, value: ir.Value, to: ir.DataType, *, after: bool = False) -> ir.Value:
    """``value`` in another float type, by a Cast before or after ``node``; the caller wires it."""
    name = f"{value.name}/{'float32' if to == ir.DataType.FLOAT else to.name.lower()}"
    output = ir.Value(name=name, shape=value.shape, type=ir.TensorType(to))
    made = ir.node("Cast", [value], {"to": int(to)}, outputs=[output], name=name)
    if after:
        graph_of(node).insert_after(node, made)
    else:
        graph_of(node).insert_before(node, made)
    return output


def graph_of(node: ir.Node) -> ir.Graph:
    """The graph a node stands in.

    Raises:
        ExportError: it was removed from its graph, or is inside a function.
    """
    if not isinstance(node.graph, ir.Graph):
        raise ExportError(f"node {node.name!r} is in no graph")
    return node.graph
