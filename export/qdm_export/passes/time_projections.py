"""Projections of the time embedding, looked up.

Where the embedding depends on the timestep alone (``time_table``), so do the projections of all residual blocks, and
one lookup takes the place of two dozen products that read the whole of their weights for each row of a batch.
"""

import numpy as np
import onnx_ir as ir

from qdm_export.metadata import CENTRED_KEY, TIME_TABLE_KEY
from qdm_export.passes.base import GraphPass, NoMatch, constant, place_of, values_of
from qdm_export.passes.projections import inputs_behind, operands, projections
from qdm_export.rewrites import Found, Place

__all__ = ["TimeProjections"]

# The table may take this many times the memory of the weights that it replaces.
_LARGEST = 2


class TimeProjections(GraphPass):
    """One Gather and one Split in place of the projections of the looked-up embedding."""

    name = "time projections"

    def promised(self, model: ir.Model) -> list[Place]:
        """Every projection of the time embedding."""
        return [place_of(node) for node in projections(model)]

    def rewrite(self, model: ir.Model) -> Found:
        """Replace those that read the table, if the table of their results is not much larger than their weights."""
        found = Found()
        lookup = next((node for node in model.graph if TIME_TABLE_KEY in node.metadata_props), None)
        timestep = next((value for value in model.graph.inputs if value.name == "timestep"), None)
        computed = timestep is not None and timestep.dtype == ir.DataType.FLOAT
        fitting = []
        for node in projections(model):
            name = place_of(node).name
            others = inputs_behind(node.inputs[0], model.graph.inputs) - {"timestep"} if node.inputs[0] else set()
            if others:
                found.left[name] = f"it depends on {', '.join(sorted(others))} too"
            elif lookup is None or lookup.inputs[0] is None:
                if computed:
                    found.left[name] = "the time embedding is computed: timesteps may lie between two"
                else:
                    found.missed[name] = "the graph has no table of the time embedding"
            elif node.inputs[0] is not lookup.outputs[0]:
                found.missed[name] = "something stands between it and the table of the time embedding"
            else:
                rows = values_of(lookup.inputs[0])
                if len(rows) > _LARGEST * rows.shape[1]:
                    found.left[name] = f"a table of {len(rows)} timesteps is too large for {rows.shape[1]} channels"
                    continue
                try:
                    operands(node)
                except NoMatch as reason:
                    found.missed[name] = str(reason)
                else:
                    fitting.append(node)
        if fitting and lookup is not None:
            _look_up(model, lookup, fitting)
            found.done += [place_of(node).name for node in fitting]
            model.graph.remove(fitting, safe=True)
            if not lookup.outputs[0].uses():
                model.graph.remove(lookup, safe=True)
        return found


def _look_up(model: ir.Model, lookup: ir.Node, products: list[ir.Node]) -> None:
    embedding, table_value = lookup.outputs[0], lookup.inputs[0]
    if table_value is None:
        return
    rows = values_of(table_value).astype(np.float64)
    columns, outputs = [], []
    for node in products:
        weight, bias = operands(node)
        old = node.outputs[0]
        new = ir.Value(name=f"{old.name}/looked_up", shape=old.shape, type=old.type)
        if CENTRED_KEY in old.metadata_props:
            new.metadata_props[CENTRED_KEY] = old.metadata_props[CENTRED_KEY]
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
