"""Attention without passes over memory that only move its operands, for OpenVINO's CPU plugin.

The plugin's convolutions have channels last, and attention wants rows of channels: in memory the same. But the exporter
flattens the positions before it turns them, [B, C, H, W] to [B, C, H W] to [B, H W, C], and the plugin, which follows,
turns the tensor around twice. Turned first and flattened then, nothing moves. Keys are swapped through a flattening of
batch and heads; swapped by a transpose right before the product, the plugin's attention kernel reads them as they lie.
So it does queries, where their transpose into heads comes last and the scale before it.

No number changes.
"""

import numpy as np
import onnx_ir as ir

from qdm_export.passes.attention import AttentionPass, keys_transpose, one_reader, permutation, producer, scaled_operand
from qdm_export.passes.base import NodePass, NoMatch, add_before, constant

__all__ = ["AttentionInput", "AttentionLayout"]


class AttentionInput(NodePass):
    """A norm of flattened positions, and the transpose behind it, become norm, transpose, flatten.

    Runs before norms are rewritten.
    """

    name = "attention inputs"

    def places(self, model: ir.Model) -> list[ir.Node]:
        """Every GroupNormalization of [B, C, positions]."""
        norms = [node for node in model.graph if node.op_type == "GroupNormalization"]
        return [
            node for node in norms if (data := node.inputs[0]) is None or data.shape is None or len(data.shape) == 3
        ]

    def at(self, model: ir.Model, node: ir.Node) -> None:
        """Turn first, flatten then."""
        flat = producer(node, 0, "Reshape", "its input")
        data = flat.inputs[0]
        if data is None or data.shape is None or len(data.shape) != 4:
            raise NoMatch(f"Reshape {flat.name} does not flatten [B, C, H, W]")
        channels, height, width = list(data.shape)[1:]
        if not (isinstance(channels, int) and isinstance(height, int) and isinstance(width, int)):
            raise NoMatch(f"its input has the shape {data.shape}, which is not static behind the batch")
        if list(flat.outputs[0].shape or [])[1:] != [channels, height * width]:
            raise NoMatch(f"Reshape {flat.name} does not flatten [B, C, H, W] to [B, C, H W]")
        turn = one_reader(node, "Transpose", 0, "its result")
        if permutation(turn) != (0, 2, 1):
            raise NoMatch(f"Transpose {turn.name} does not make [B, H W, C] of its result")
        node.replace_input_with(0, data)
        node.outputs[0].shape = data.shape
        image = ir.Shape([data.shape[0], height, width, channels])
        last = add_before(turn, "Transpose", [node.outputs[0]], "turned", image, perm=(0, 2, 3, 1))
        shape = constant(model, f"rows_{height * width}x{channels}", np.array([0, height * width, channels]))
        rows = add_before(turn, "Reshape", [last, shape], "flat", ir.Shape([data.shape[0], height * width, channels]))
        turn.outputs[0].replace_all_uses_with(rows)
        model.graph.remove(turn, safe=True)


class AttentionLayout(AttentionPass):
    """Keys are swapped, and queries taken into heads, right before their product. Runs before products are cast."""

    name = "attention layout"

    def at(self, model: ir.Model, node: ir.Node) -> None:
        """Move both transposes behind the scales."""
        scores, keys = scaled_operand(node, 1)
        _, queries = scaled_operand(node, 0)
        keys_to_heads = keys_transpose(keys)
        queries_to_heads = producer(queries, 0, "Transpose", "its queries")
        shape = keys_to_heads.outputs[0].shape
        if shape is None or len(shape) != 4:
            raise NoMatch("its keys have no known shape")
        _swap_keys_last(scores, keys, keys_to_heads.outputs[0], shape)
        _scale_queries_first(scores, queries, queries_to_heads)


def _swap_keys_last(scores: ir.Node, scaled: ir.Node, keys: ir.Value, shape: ir.Shape) -> None:
    """Keys are taken into heads and scaled as [B, H, S, d], and swapped right before the product."""
    batch, heads, rows, width = shape
    scaled.replace_input_with(0, keys)
    scaled.outputs[0].shape = shape
    turned = ir.Shape([batch, heads, width, rows])
    swapped = add_before(scores, "Transpose", [scaled.outputs[0]], "keys", turned, perm=(0, 1, 3, 2))
    scores.replace_input_with(1, swapped)


def _scale_queries_first(scores: ir.Node, scaled: ir.Node, to_heads: ir.Node) -> None:
    """Queries are scaled before they are taken into heads, so that the transpose stands right before the product."""
    source, factor = to_heads.inputs[0], scaled.inputs[1]
    if source is None or factor is None:
        return
    first = add_before(to_heads, "Mul", [source, factor], "queries", source.shape)
    shape = scaled.outputs[0].shape
    turned = add_before(scores, "Transpose", [first], "queries", shape, perm=permutation(to_heads))
    scores.replace_input_with(0, turned)
