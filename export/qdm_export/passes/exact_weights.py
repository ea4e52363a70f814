"""Weights of float layers that a bfloat16 rest must not round.

A rounded activation errs by chance; a rounded weight errs in the same way at every step and in every picture. On the
embedded model the projections of the time embedding made all pictures brighter, and shortcuts took contrast away; SQNR
hardly shows either, distances between sets of pictures do (docs/adr/0020). The graph keeps its meaning: in float32 it
gives what it gave before.
"""

import numpy as np
import onnx_ir as ir

from qdm_export.metadata import PHASE_KEY
from qdm_export.passes.base import GraphPass, PlanPass, add_before, constant, graph_of, named_node, values_of
from qdm_export.rewrites import Found, Place
from qdm_export.topology import LayerNode, layer_nodes, weight_is_transposed

__all__ = ["EmbeddingConvolutions", "SplitShortcuts", "has_no_positions"]


def has_no_positions(value: ir.Value) -> bool:
    """Whether a value is a float32 [B, C], or [B, C, 1, 1], of any number of rows."""
    if value.shape is None or value.dtype != ir.DataType.FLOAT:
        return False
    rows, *sizes = list(value.shape) or [1]
    channels, *positions = sizes or [None]
    return not isinstance(rows, int) and isinstance(channels, int) and all(size == 1 for size in positions)


class EmbeddingConvolutions(GraphPass):
    """Products [B, K] by [K, C], which make channels of an embedding, as convolutions of a single position.

    OpenVINO's plugin drops the mark that keeps a matrix product in float32; a convolution's it heeds.
    """

    name = "embeddings in float32"

    def rewrite(self, model: ir.Model) -> Found:
        """Rewrite what lookups have left of them."""
        found = Found()
        for layer in layer_nodes(model):
            if layer.kind == "linear" and has_no_positions(layer.node.outputs[0]):
                _make_convolution(model, layer)
                found.done.append(layer.name)
        return found

    def ensures(self, model: ir.Model) -> None:
        """Check that no matrix product with a weight makes an embedding."""
        for layer in layer_nodes(model):
            if layer.kind == "linear" and has_no_positions(layer.node.outputs[0]):
                raise ir.passes.PostconditionError(f"{layer.name} is still a matrix product")


class SplitShortcuts(PlanPass):
    """Shortcuts in float, 1x1 convolutions, as two: one by the weights in bfloat16, one by what that left of them.

    x w = x half(w) + x (w - half(w)); the second goes to what the shortcut is added to, where it is added: there the
    plugin makes both additions part of the two convolutions. Which way OpenVINO rounds does not matter.
    """

    name = "shortcuts in two parts"

    def promised(self, model: ir.Model) -> list[Place]:
        """Every convolution of one tap that the plan keeps in float."""
        return [Place(name) for name in self._kept()]

    def rewrite(self, model: ir.Model) -> Found:
        """Split them, but for those of a single position, which stay in float32 altogether."""
        found, kept = Found(), set(self._kept())
        for layer in layer_nodes(model):
            if layer.name in kept and has_no_positions(layer.node.outputs[0]):
                found.left[layer.name] = "it has a single position, and is float32 altogether"
            elif layer.name in kept:
                _split(model, layer)
                found.done.append(layer.name)
        return found

    def _kept(self) -> list[str]:
        in_float = [item.layer for item in self.plan.layers if item.precision == "float" and item.layer.kind == "conv"]
        return [layer.name for layer in in_float if all(size == 1 for size in layer.weight_shape[2:])]


def _make_convolution(model: ir.Model, layer: LayerNode) -> None:
    """Put a convolution of [B, K, 1, 1] in a product's place, its bias with it."""
    node, result = layer.node, layer.output
    weight = values_of(layer.weight)
    kernel = np.ascontiguousarray(weight.T if weight_is_transposed(node) else weight)[:, :, None, None]
    rows = None if layer.data.shape is None else layer.data.shape[0]
    given = add_before(
        node,
        "Reshape",
        [layer.data, constant(model, "embedding/one_position", np.array([0, 0, 1, 1]))],
        "one_position",
        ir.Shape([rows, kernel.shape[1], 1, 1]),
    )
    operands = [given, constant(model, f"{layer.name}/kernel", kernel)]
    if layer.bias is not None:
        operands.append(constant(model, f"{layer.name}/bias", values_of(layer.bias)))
    made = add_before(node, "Conv", operands, "convolution", ir.Shape([rows, len(kernel), 1, 1]), kernel_shape=[1, 1])
    flat = constant(model, "embedding/flat", np.array([0, -1]))
    shaped = add_before(node, "Reshape", [made, flat], "flat", ir.Shape([rows, len(kernel)]))
    shaped.metadata_props.update(result.metadata_props)
    result.replace_all_uses_with(shaped, replace_graph_outputs=True)
    graph_of(node).remove([each for each in (layer.bias_add, node) if each is not None], safe=True)


def _split(model: ir.Model, layer: LayerNode) -> None:
    weight = values_of(layer.weight)
    half = weight.astype(ir.DataType.BFLOAT16.numpy()).astype(np.float32)
    shortcut = layer.node
    operands = [layer.data, constant(model, f"{layer.name}/weight_rest", weight - half)]
    attributes = {name: each.value for name, each in shortcut.attributes.items()}
    rest = named_node(layer, "Conv", operands, "rest", attributes)
    rest.metadata_props[PHASE_KEY] = "rest"
    rest.outputs[0].shape = shortcut.outputs[0].shape
    shortcut.replace_input_with(1, constant(model, f"{layer.name}/weight_bfloat16", half))
    graph = graph_of(shortcut)
    graph.insert_after(shortcut, rest)
    readers = list(shortcut.outputs[0].uses())
    place = _other_addend(shortcut)
    if place is not None:
        total, index = place
        added = named_node(layer, "Add", [rest.outputs[0], total.inputs[index]], "add_rest", {})
        graph.insert_before(total, added)
        total.replace_input_with(index, added.outputs[0])
        return
    added = named_node(layer, "Add", [shortcut.outputs[0], rest.outputs[0]], "add_rest", {})
    graph.insert_after(rest, added)
    for reader in readers:
        reader.node.replace_input_with(reader.idx, added.outputs[0])


def _other_addend(shortcut: ir.Node) -> tuple[ir.Node, int] | None:
    """The block's sum, and which of its operands is not the shortcut; None where there is no such sum."""
    readers = [use for use in shortcut.outputs[0].uses() if use.node.op_type != "Shape"]
    if len(readers) != 1 or readers[0].node.op_type != "Add" or shortcut.outputs[0].is_graph_output():
        return None
    other = 1 - readers[0].idx
    value = readers[0].node.inputs[other]
    is_sum = value is not None and value.const_value is None and value.shape == shortcut.outputs[0].shape
    return (readers[0].node, other) if is_sum else None
