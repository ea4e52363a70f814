"""Row links that survive a server's own batching.

The step graph links the rows of a guided image by their index in the batch: ``unconditional_row`` says where a row's
unconditional twin is, ``owner_row`` whose state it takes. A server that concatenates requests shifts every request but
the first, and their links would point into other requests, with or without guidance. Here the links become distances
from the row itself, which concatenation does not change, as long as the rows of one request stay together.
"""

import numpy as np
import onnx_ir as ir

from qdm_deploy.errors import ExportError
from qdm_export.passes.base import constant

__all__ = ["OFFSETS", "make_links_relative"]

OFFSETS = {"unconditional_row": "unconditional_offset", "owner_row": "owner_offset"}


def make_links_relative(model: ir.Model) -> None:
    """Replace, in place, the inputs ``*_row`` [B] int64 by ``*_offset`` [B] int64: row = its own index + offset.

    Raises:
        ExportError: the graph has no row links.
    """
    graph = model.graph
    inputs = {value.name: value for value in graph.inputs}
    missing = [name for name in ("sample", *OFFSETS) if name not in inputs]
    if missing:
        raise ExportError(f"the step graph has no input {missing[0]}: its rows have no links")
    links = [inputs[name] for name in OFFSETS]

    def scalar(name: str, value: int) -> ir.Value:
        return constant(model, f"links/{name}", np.int64(value))

    axis = constant(model, "links/axis", np.array([0], np.int64))
    shape = ir.node("Shape", [inputs["sample"]], {"start": 0, "end": 1}, name="links/shape")
    count = ir.node("Squeeze", [shape.outputs[0], axis], name="links/count")
    index = ir.node("Range", [scalar("zero", 0), count.outputs[0], scalar("one", 1)], name="links/index")
    nodes = [shape, count, index]
    for link in links:
        offset = ir.Value(name=OFFSETS[str(link.name)], shape=link.shape, type=link.type)
        row = ir.node("Add", [index.outputs[0], offset], name=f"links/{link.name}")
        row.outputs[0].shape, row.outputs[0].type = link.shape, link.type
        for use in tuple(link.uses()):
            use.node.replace_input_with(use.idx, row.outputs[0])
        graph.inputs[graph.inputs.index(link)] = offset
        nodes.append(row)
    for node in nodes:
        if node.outputs[0].name is None:
            node.outputs[0].name = f"{node.name}/out"
    graph.insert_before(graph[0], nodes)
