"""What residual blocks make of the time embedding: each projects it to its channels, for itself.

Where the embedding depends on the timestep alone (``time_table``), so do the projections, and one lookup takes the
place of two dozen products that read the whole of their weights for each row of a batch.

A projection that is only added in front of a group norm is centred in each group, by its weights: the norm takes the
mean of a group away again, so nothing changes, and the norm need not ask for it. All is computed in float64.
"""

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from qdm_export.passes.base import constant, values_of
from qdm_export.topology import weight_is_transposed

__all__ = ["CENTRED", "TimeProjections", "behind_reshapes"]

# In ``meta`` of a value [B, C]: into how many groups its channels fall that have a mean of 0 each.
CENTRED = "qdm.centred"
# The table may take this many times the memory of the weights that it replaces.
_LARGEST = 2
_RESHAPES = ("Unsqueeze", "Reshape")


class TimeProjections(ir.passes.InPlacePass):
    """Centres every Gemm of constants that a group norm alone reads, and looks up those of the timestep alone."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place."""
        projections = [node for node in model.graph if _is_projection(node)]
        centred = [node for node in projections if _centre(model, node)]
        looked_up = _look_up(model, projections)
        return ir.passes.PassResult(model, modified=bool(centred or looked_up))


def behind_reshapes(value: ir.Value) -> ir.Value:
    """The value that this one only shows in another shape."""
    producer = value.producer()
    while producer is not None and producer.op_type in _RESHAPES and producer.inputs[0] is not None:
        value = producer.inputs[0]
        producer = value.producer()
    return value


def _is_projection(node: ir.Node) -> bool:
    plain = all(name not in node.attributes or node.attributes[name].as_float() == 1.0 for name in ("alpha", "beta"))
    constants = all(operand is not None and operand.const_value is not None for operand in node.inputs[1:])
    return node.op_type == "Gemm" and len(node.inputs) == 3 and plain and constants


def _operands(node: ir.Node) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Weight [C, D] and bias [C]."""
    weight, bias = (values_of(operand).astype(np.float64) for operand in node.inputs[1:] if operand is not None)
    return (weight.T if weight_is_transposed(node) else weight), bias


def _centre(model: ir.Model, node: ir.Node) -> bool:
    output = node.outputs[0]
    groups = _groups_behind(output)
    if groups is None or CENTRED in output.meta:
        return False
    weight, bias = (_without_group_means(values, groups) for values in _operands(node))
    stored = weight.T if weight_is_transposed(node) else weight
    for index, values in ((1, stored), (2, bias)):
        name = f"{node.inputs[index].name}/centred"  # type: ignore[union-attr]  # a projection has three inputs
        node.replace_input_with(index, constant(model, name, values.astype(np.float32)))
    output.meta[CENTRED] = groups
    return True


def _groups_behind(value: ir.Value) -> int | None:
    """The groups of the one norm that reads a sum with ``value``, where nothing else reads either."""
    channels = None if value.shape is None else value.shape[1]
    readers = list(value.uses())
    while len(readers) == 1 and not value.is_graph_output():
        node = readers[0].node
        if node.op_type == "GroupNormalization":
            return node.attributes["num_groups"].as_int()
        if node.op_type not in (*_RESHAPES, "Add"):
            return None
        if node.op_type == "Add" and (value.shape is None or len(value.shape) < 2 or value.shape[1] != channels):
            return None  # not lined up with the channels
        value = node.outputs[0]
        readers = list(value.uses())
    return None


def _without_group_means(values: NDArray[np.float64], groups: int) -> NDArray[np.float64]:
    """[C, ...] less the mean over the channels of each group."""
    each = values.reshape(groups, -1, *values.shape[1:])
    centred: NDArray[np.float64] = each - each.mean(axis=1, keepdims=True)
    return centred.reshape(values.shape)


def _look_up(model: ir.Model, projections: list[ir.Node]) -> bool:
    """One Gather and one Split in place of the projections of the looked-up embedding."""
    lookup = next((node for node in model.graph if node.name == "time_embedding" and node.op_type == "Gather"), None)
    if lookup is None or lookup.inputs[0] is None:
        return False
    embedding, rows = lookup.outputs[0], values_of(lookup.inputs[0]).astype(np.float64)
    products = [node for node in projections if node.inputs[0] is embedding]
    if not products or len(rows) > _LARGEST * rows.shape[1]:
        return False
    columns, outputs = [], []
    for node in products:
        weight, bias = _operands(node)
        old = node.outputs[0]
        new = ir.Value(name=f"{old.name}/looked_up", shape=old.shape, type=old.type)
        new.meta.update(old.meta)
        old.replace_all_uses_with(new)
        columns.append((rows @ weight.T + bias).astype(np.float32))
        outputs.append(new)
    table = constant(model, "time_projection_table", np.concatenate(columns, axis=1))
    widths = constant(model, "time_projection_widths", np.array([part.shape[1] for part in columns]))
    batch = None if embedding.shape is None else embedding.shape[0]
    row = ir.Value(
        name="time_projections",
        shape=ir.Shape([batch, sum(part.shape[1] for part in columns)]),
        type=ir.TensorType(ir.DataType.FLOAT),
    )
    gather = ir.node("Gather", [table, lookup.inputs[1]], {"axis": 0}, outputs=[row], name="time_projections")
    split = ir.node("Split", [row, widths], {"axis": 1}, outputs=outputs, name="time_projections/each")
    model.graph.insert_after(lookup, [gather, split])
    common.RemoveUnusedNodesPass()(model)
    return True
