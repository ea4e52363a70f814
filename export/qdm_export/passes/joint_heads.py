"""Queries, keys and values brought into the heads' layout together.

The exporter takes each of them apart into heads by itself, [B, S, H d] to [B, H, S, d], and scales queries and keys:
three passes over memory in a TensorRT engine (rescale and bias of the product, transpose, scale), and for the keys a
chain of Reshape and Shape nodes besides. Written as one tensor [B, S, 3 H d] that is transposed once and split, they
are one pass. No number changes: what is computed is the same, value for value.

What is matched is ``softmax((a q) (b k)^T) v`` as torch's scaled_dot_product_attention is exported at opset 21, where
q, k and v have the same shape; anything else stays as it is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qdm_export.passes.attention import (
    TO_HEADS,
    AttentionPass,
    heads_transpose,
    keys_transpose,
    one_reader,
    producer,
    scaled_operand,
)
from qdm_export.passes.base import NoMatch, constant, graph_of, place_of, values_of
from qdm_export.rewrites import Found, Place
from qdm_export.topology import layer_nodes

__all__ = ["JointHeads"]


class JointHeads(AttentionPass):
    """Rewrites every self-attention; what is left without a reader is for another pass to remove."""

    name = "attention heads"

    def promised(self, model: ir.Model) -> list[Place]:
        """Every Softmax whose queries and keys are made of the same tensor."""
        layers = {item.node: item.data for item in layer_nodes(model)}
        return [place_of(node) for node in self.places(model) if len(_sources(node.inputs[0], layers)) == 1]

    def at(self, model: ir.Model, node: ir.Node) -> None:
        """Put one transpose in the place of three."""
        _rewrite(model, _matched(node))

    def rewrite(self, model: ir.Model) -> Found:
        """Rewrite every one, and sort: what is new stands behind some of its readers."""
        found = super().rewrite(model)
        model.graph.sort()
        return found


def _sources(value: ir.Value | None, layers: Mapping[ir.Node, ir.Value]) -> set[ir.Value]:
    """What the layers read that make a value, the nearest on every path."""
    found: set[ir.Value] = set()
    queue = [] if value is None else [value]
    seen = set(queue)
    while queue:
        node = queue.pop().producer()
        if node is None or node.op_type == "Shape":  # a tensor's shape says nothing of its values
            continue
        if node in layers:
            found.add(layers[node])
            continue
        new = [each for each in node.inputs if each is not None and each not in seen]
        seen.update(new)
        queue += new
    return found


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


def _matched(softmax: ir.Node) -> _Attention:
    _, keys = scaled_operand(softmax, 1)
    _, queries = scaled_operand(softmax, 0)
    weighted = one_reader(softmax, "MatMul", 0, "its result")
    sources, shapes = [], []
    for transpose, what in (
        (heads_transpose(queries, 0, "its queries"), "its queries"),
        (keys_transpose(keys), "its keys"),
        (heads_transpose(weighted, 1, "its values"), "its values"),
    ):
        split = producer(transpose, 0, "Reshape", what)
        if split.inputs[0] is None or split.inputs[1] is None or split.inputs[1].const_value is None:
            raise NoMatch(f"Reshape {split.name} has a shape that is computed")
        sources.append(split.inputs[0])
        shapes.append(tuple(int(size) for size in values_of(split.inputs[1])))
    if len(set(shapes)) != 1 or len(shapes[0]) != 4 or min(shapes[0][1:]) < 1:
        raise NoMatch(f"its queries, keys and values are taken into heads of different shapes: {shapes}")
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
