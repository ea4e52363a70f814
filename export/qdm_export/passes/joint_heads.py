"""Queries, keys and values brought into the heads' layout together.

The exporter takes each of them apart into heads by itself, [B, S, H d] to [B, H, S, d], and scales queries and keys:
three passes over memory in a TensorRT engine (rescale and bias of the product, transpose, scale), and for the keys a
chain of Reshape and Shape nodes besides. Written as one tensor [B, S, 3 H d] that is transposed once and split, they
are one pass. No number changes: what is computed is the same, value for value.

What is matched is ``softmax((a q) (b k)^T) v`` as torch's scaled_dot_product_attention is exported at opset 21, where
q, k and v have the same shape; anything else stays as it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qdm_export.passes.attention import TO_HEADS, keys_transpose, permutation, producer
from qdm_export.passes.base import constant, graph_of, values_of

__all__ = ["JointHeads"]


class JointHeads(ir.passes.InPlacePass):
    """Rewrites every self-attention of the graph; what is left without a reader is for another pass to remove."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place."""
        modified = False
        for node in list(model.graph):
            if node.op_type == "Softmax" and (attention := _matched(node)) is not None:
                _rewrite(model, attention)
                modified = True
        if modified:
            model.graph.sort()  # what is new stands behind some of its readers, and later passes read in order
        return ir.passes.PassResult(model, modified=modified)


@dataclass(frozen=True)
class _Attention:
    """One match: the nodes that read queries, keys and values in their final layout, and what these come from."""

    softmax: ir.Node
    readers: tuple[ir.Node, ir.Node, ir.Node]
    inputs: tuple[int, int, int]
    sources: tuple[ir.Value, ir.Value, ir.Value]
    rows: int
    heads: int
    width: int


def _matched(softmax: ir.Node) -> _Attention | None:
    scores = producer(softmax, 0, "MatMul")
    uses = list(softmax.outputs[0].uses())
    if scores is None or len(uses) != 1 or uses[0].node.op_type != "MatMul" or uses[0].idx != 0:
        return None
    weighted = uses[0].node
    queries, keys = producer(scores, 0, "Mul"), producer(scores, 1, "Mul")
    if queries is None or keys is None:
        return None
    sources, shapes = [], []
    for transpose in (producer(queries, 0, "Transpose"), keys_transpose(keys), producer(weighted, 1, "Transpose")):
        if transpose is None or permutation(transpose) != TO_HEADS:
            return None
        split = producer(transpose, 0, "Reshape")
        if split is None or split.inputs[0] is None or split.inputs[1] is None or split.inputs[1].const_value is None:
            return None
        sources.append(split.inputs[0])
        shapes.append(tuple(int(size) for size in values_of(split.inputs[1])))
    if len(set(shapes)) != 1 or len(shapes[0]) != 4 or min(shapes[0][1:]) < 1:
        return None
    _, rows, heads, width = shapes[0]
    query, key, value = sources
    return _Attention(softmax, (queries, keys, weighted), (0, 0, 1), (query, key, value), rows, heads, width)


def _rewrite(model: ir.Model, found: _Attention) -> None:
    name = f"{found.softmax.name}/heads"
    shape = constant(
        model,
        f"heads_{found.rows}x{found.heads}x{found.width}",
        np.array([-1, found.rows, 3 * found.heads, found.width]),
    )
    batch = found.sources[0].shape[0] if found.sources[0].shape is not None else None
    rows, heads, width = found.rows, found.heads, found.width

    def add(
        op_type: str, inputs: list[ir.Value], label: str, sizes: list[tuple[int, ...]], **how: int | Sequence[int]
    ) -> ir.Node:
        outputs = [
            ir.Value(
                name=f"{name}/{label}{index if len(sizes) > 1 else ''}",
                type=found.sources[0].type,
                shape=ir.Shape([batch, *size]),
            )
            for index, size in enumerate(sizes)
        ]
        node = ir.node(
            op_type,
            inputs,
            how,
            outputs=outputs,
            name=f"{name}/{label}",
            metadata_props=dict(found.softmax.metadata_props),
        )
        graph_of(found.softmax).insert_before(found.softmax, node)
        return node

    joint = add("Concat", list(found.sources), "joint", [(rows, 3 * heads * width)], axis=2)
    apart = add("Reshape", [joint.outputs[0], shape], "apart", [(rows, 3 * heads, width)], allowzero=0)
    turned = add("Transpose", [apart.outputs[0]], "turned", [(3 * heads, rows, width)], perm=TO_HEADS)
    three = add("Split", [turned.outputs[0]], "split", [(heads, rows, width)] * 3, axis=1, num_outputs=3)
    query, key, value = three.outputs
    key = add("Transpose", [key], "swapped", [(heads, width, rows)], perm=(0, 1, 3, 2)).outputs[0]
    for reader, index, operand in zip(found.readers, found.inputs, (query, key, value), strict=True):
        reader.replace_input_with(index, operand)
