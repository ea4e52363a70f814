"""What every pass shares: how it is made, checked and counted, and how it inserts nodes.

A target's graph is made by passes that run one after the other (``targets``). A pass

- has a ``name``, the noun that a report counts: "norms";
- is made from ``Settings`` by ``made``, so that a target can list its passes as classes;
- says in ``promised`` at which places of the float graph it has to rewrite. It counts operators there; it does not use
  the pattern that it matches later;
- says in ``rewrite`` where it did and where it did not, with the reason;
- checks in ``requires`` and ``ensures`` what it needs and what it leaves behind;
- changes nothing in a graph in which it ran before.

``NodePass`` is for a rewriting of single nodes, ``PlanPass`` for what a plan says of layers. To pass a place by, raise
``NoMatch`` (the graph is not as expected: the build fails) or ``LeftAlone`` (a rule says so).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qdm_deploy.artifacts.plan import LayerPlan, QuantizationPlan
from qdm_deploy.errors import ExportError
from qdm_export.metadata import LAYER_KEY, PART_KEY, PASSES_KEY, module_of
from qdm_export.rewrites import Found, Place
from qdm_export.topology import LayerNode, layer_nodes

__all__ = [
    "GraphPass",
    "LeftAlone",
    "NoMatch",
    "NodePass",
    "PlanPass",
    "Rewritten",
    "Settings",
    "add_before",
    "cast",
    "constant",
    "graph_of",
    "insert_after",
    "insert_before",
    "layer_groups",
    "named_node",
    "place_of",
    "producer_of",
    "require_float_inputs",
    "require_integers",
    "values_of",
    "whole_timestep",
]


class NoMatch(Exception):
    """Why a place does not have the form that a rewriting expects there."""


class LeftAlone(Exception):
    """Which rule leaves a place as it is."""


@dataclass(frozen=True)
class Settings:
    """What passes are made from.

    Attributes:
        plan: what to quantize, with which numbers.
        unsigned: activation codes are u8, with the zero offset in the zero point; otherwise s8.
        packed_weights: codes of 4 bits are stored as INT4.
        rest: type of what is not INT8.
        least_scores: from how many scores of a head on attention multiplies bfloat16, where a target has that.
    """

    plan: QuantizationPlan
    unsigned: bool
    packed_weights: bool
    rest: ir.DataType
    least_scores: int


@dataclass
class Rewritten(ir.passes.PassResult):
    """The model, whether it changed, and what the pass found."""

    found: Found


class GraphPass(ir.passes.InPlacePass):
    """One rewriting of a step graph, in place."""

    name: ClassVar[str]

    @classmethod
    def made(cls, settings: Settings) -> Self:
        """The pass for a target and a plan."""
        return cls()

    def promised(self, model: ir.Model) -> list[Place]:
        """The places of a float graph that have to be rewritten."""
        return []

    def rewrite(self, model: ir.Model) -> Found:
        """Change the graph."""
        raise NotImplementedError

    def call(self, model: ir.Model) -> Rewritten:
        """Rewrite ``model`` unless this pass already has."""
        applied = model.metadata_props.get(PASSES_KEY, "").split()
        if type(self).__name__ in applied:
            return Rewritten(model, modified=False, found=Found())
        found = self.rewrite(model)
        model.metadata_props[PASSES_KEY] = " ".join([*applied, type(self).__name__])
        return Rewritten(model, modified=bool(found.done), found=found)


class NodePass(GraphPass):
    """Rewrites nodes one by one."""

    def places(self, model: ir.Model) -> list[ir.Node]:
        """The nodes to rewrite, by operator."""
        raise NotImplementedError

    def at(self, model: ir.Model, node: ir.Node) -> None:
        """Rewrite what belongs to ``node``.

        Raises:
            NoMatch: it has another form; nothing was changed then.
            LeftAlone: it stays as it is.
        """
        raise NotImplementedError

    def promised(self, model: ir.Model) -> list[Place]:
        """Every one of them."""
        return [place_of(node) for node in self.places(model)]

    def rewrite(self, model: ir.Model) -> Found:
        """Try every one of them."""
        found = Found()
        for node in self.places(model):
            name = place_of(node).name
            try:
                self.at(model, node)
            except NoMatch as reason:
                found.missed[name] = str(reason)
            except LeftAlone as reason:
                found.left[name] = str(reason)
            else:
                found.done.append(name)
        return found


class PlanPass(GraphPass):
    """Applies one part of a plan; its places are layers."""

    def __init__(self, plan: QuantizationPlan) -> None:
        """Apply decisions of ``plan``."""
        super().__init__()
        self.plan = plan

    @classmethod
    def made(cls, settings: Settings) -> Self:
        """With the plan of the settings."""
        return cls(settings.plan)

    def concerns(self, plan: LayerPlan) -> bool:
        """Whether an INT8 layer has this part."""
        return True

    def promised(self, model: ir.Model) -> list[Place]:
        """Every INT8 layer that has this part."""
        return [Place(plan.name) for plan in self.plan.quantized if self.concerns(plan)]

    def apply(self, model: ir.Model, layers: Sequence[tuple[LayerPlan, LayerNode]]) -> Iterable[str]:
        """Change the graph; ``layers`` are the INT8 layers with their nodes. Returns the layers that were rewritten."""
        raise NotImplementedError

    def rewrite(self, model: ir.Model) -> Found:
        """Apply it to the INT8 layers."""
        return Found(done=list(self.apply(model, planned_nodes(model, self.plan))))


def planned_nodes(model: ir.Model, plan: QuantizationPlan) -> list[tuple[LayerPlan, LayerNode]]:
    """The INT8 layers of a plan with their nodes.

    Raises:
        ExportError: the plan is not of this graph.
    """
    nodes = {item.name: item for item in layer_nodes(model)}
    missing = [layer.name for layer in plan.layers if layer.name not in nodes]
    if missing:
        raise ExportError(
            f"the plan is not of this graph: {len(missing)} of its layers are not in it (first: {missing[0]})"
        )
    return [(layer, nodes[layer.name]) for layer in plan.quantized]


def require_float_inputs(model: ir.Model, plan: QuantizationPlan) -> None:
    """Check that no INT8 layer's input is quantized yet.

    Raises:
        PreconditionError: one is.
    """
    for item in _present(model, plan):
        if _is_dequantized(item.node.inputs[0]):
            raise ir.passes.PreconditionError(f"the input of {item.name} is quantized already")


def require_integers(model: ir.Model, plan: QuantizationPlan, *indices: int) -> None:
    """Check that these inputs of all INT8 layers come from codes: 0 is the data, 1 the weight.

    Raises:
        PreconditionError: one does not.
    """
    for item in _present(model, plan):
        for index in indices:
            if not _is_dequantized(item.node.inputs[index]):
                what = "weight" if index else "input"
                raise ir.passes.PreconditionError(f"the {what} of {item.name} is not quantized yet")


def _present(model: ir.Model, plan: QuantizationPlan) -> list[LayerNode]:
    """The INT8 layers that the graph has; that it has all of them is checked where a plan is applied."""
    names = {layer.name for layer in plan.quantized}
    return [item for item in layer_nodes(model) if item.name in names]


def _is_dequantized(value: ir.Value | None) -> bool:
    producer = None if value is None else value.producer()
    return producer is not None and producer.op_type == "DequantizeLinear"


def producer_of(value: ir.Value | None) -> ir.Node:
    """The node that makes a value.

    Raises:
        ExportError: none does.
    """
    node = None if value is None else value.producer()
    if node is None:
        raise ExportError(f"no node makes {'a value' if value is None else value.name}")
    return node


def place_of(node: ir.Node) -> Place:
    """A node as a place."""
    return Place(str(node.name), module_of(node))


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
    properties = {**layer.node.metadata_props, LAYER_KEY: layer.name, PART_KEY: label}
    return ir.node(op_type, inputs, attributes, outputs=[output], name=name, metadata_props=properties)


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
