"""Linear layers that read nothing but the time embedding, as columns of one table with a row per timestep.

Every residual block projects the time embedding for itself. Where that depends on the timestep alone
(``time_table``), so do the projections, and one lookup takes the place of two dozen products that read the whole of
their weights for each row of a batch. The table is computed in float64.

A projection that is only added in front of a group norm is centred in each group: the norm takes the mean of a group
away again, so nothing changes, and the norm need not ask for it.
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
    """Replaces every Gemm with constant operands that reads the looked-up time embedding."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place."""
        lookup = next((node for node in model.graph if node.name == "time_embedding"), None)
        if lookup is None or lookup.op_type != "Gather":
            return ir.passes.PassResult(model, modified=False)
        embedding, embeddings = lookup.outputs[0], _table(lookup)
        products = [use.node for use in embedding.uses() if _is_projection(use.node)]
        if not products or len(embeddings) > _LARGEST * embeddings.shape[1]:
            return ir.passes.PassResult(model, modified=False)
        columns, outputs = [], []
        for node in products:
            old, values = node.outputs[0], _projected(node, embeddings)
            new = ir.Value(name=f"{old.name}/looked_up", shape=old.shape, type=old.type)
            groups = _groups_behind(old)
            if groups is not None:
                values = _centred(values, groups)
                new.meta[CENTRED] = groups
            old.replace_all_uses_with(new)
            columns.append(values.astype(np.float32))
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
        return ir.passes.PassResult(model, modified=True)


def _table(lookup: ir.Node) -> NDArray[np.float64]:
    table = lookup.inputs[0]
    assert table is not None  # noqa: S101  # a Gather without data is no ONNX
    return values_of(table).astype(np.float64)


def behind_reshapes(value: ir.Value) -> ir.Value:
    """The value that this one only shows in another shape."""
    producer = value.producer()
    while producer is not None and producer.op_type in _RESHAPES and producer.inputs[0] is not None:
        value = producer.inputs[0]
        producer = value.producer()
    return value


def _is_projection(node: ir.Node) -> bool:
    operands = node.inputs[1:]
    plain = all(name not in node.attributes or node.attributes[name].as_float() == 1.0 for name in ("alpha", "beta"))
    constants = all(operand is not None and operand.const_value is not None for operand in operands)
    return node.op_type == "Gemm" and plain and constants


def _projected(node: ir.Node, embeddings: NDArray[np.float64]) -> NDArray[np.float64]:
    """[T, C]: the layer's output for every timestep."""
    weight, *bias = (values_of(operand).astype(np.float64) for operand in node.inputs[1:] if operand is not None)
    product: NDArray[np.float64] = embeddings @ (weight if weight_is_transposed(node) else weight.T)
    return product + bias[0] if bias else product


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


def _centred(values: NDArray[np.float64], groups: int) -> NDArray[np.float64]:
    each = values.reshape(len(values), groups, -1)
    centred: NDArray[np.float64] = each - each.mean(axis=2, keepdims=True)
    return centred.reshape(values.shape)
