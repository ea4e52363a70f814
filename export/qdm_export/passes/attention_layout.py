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

from qdm_export.passes.attention import keys_transpose, permutation, producer
from qdm_export.passes.base import add_before, constant

__all__ = ["AttentionLayout"]


class AttentionLayout(ir.passes.InPlacePass):
    """Rewrites what leads into attention; runs before norms are rewritten and products cast."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place; a second time there is nothing left to rewrite."""
        modified = False
        for node in list(model.graph):
            if node.op_type == "GroupNormalization":
                modified |= _turn_first(model, node)
            elif node.op_type == "Softmax":
                modified |= _swap_keys_last(node)
                modified |= _scale_queries_first(node)
        return ir.passes.PassResult(model, modified=modified)


def _turn_first(model: ir.Model, norm: ir.Node) -> bool:
    """A norm of flattened positions, and the transpose behind it: norm, transpose, flatten."""
    flat, readers = producer(norm, 0, "Reshape"), list(norm.outputs[0].uses())
    data = None if flat is None else flat.inputs[0]
    if flat is None or data is None or data.shape is None or len(data.shape) != 4 or len(readers) != 1:
        return False
    turn, (channels, height, width) = readers[0].node, list(data.shape)[1:]
    if not (isinstance(channels, int) and isinstance(height, int) and isinstance(width, int)):
        return False
    flattened = list(flat.outputs[0].shape or [])[1:] == [channels, height * width]
    if not flattened or turn.op_type != "Transpose" or permutation(turn) != (0, 2, 1):
        return False
    norm.replace_input_with(0, data)
    norm.outputs[0].shape = data.shape
    image = ir.Shape([data.shape[0], height, width, channels])
    last = add_before(turn, "Transpose", [norm.outputs[0]], "turned", image, perm=(0, 2, 3, 1))
    shape = constant(model, f"rows_{height * width}x{channels}", np.array([0, height * width, channels]))
    rows = add_before(turn, "Reshape", [last, shape], "flat", ir.Shape([data.shape[0], height * width, channels]))
    turn.outputs[0].replace_all_uses_with(rows)
    model.graph.remove(turn, safe=True)
    return True


def _swap_keys_last(softmax: ir.Node) -> bool:
    """Keys are taken into heads and scaled as [B, H, S, d], and swapped right before the product."""
    scores, scaled = _scaled(softmax, 1)
    to_heads = None if scaled is None else keys_transpose(scaled)
    if scores is None or scaled is None or to_heads is None or to_heads.outputs[0].shape is None:
        return False
    keys = to_heads.outputs[0]
    batch, heads, rows, width = to_heads.outputs[0].shape
    scaled.replace_input_with(0, keys)
    scaled.outputs[0].shape = keys.shape
    shape = ir.Shape([batch, heads, width, rows])
    swapped = add_before(scores, "Transpose", [scaled.outputs[0]], "keys", shape, perm=(0, 1, 3, 2))
    scores.replace_input_with(1, swapped)
    return True


def _scale_queries_first(softmax: ir.Node) -> bool:
    """Queries are scaled before they are taken into heads, so that the transpose stands right before the product."""
    scores, scaled = _scaled(softmax, 0)
    to_heads = None if scaled is None else producer(scaled, 0, "Transpose")
    if scores is None or scaled is None or to_heads is None:
        return False
    (source,), factor = to_heads.inputs, scaled.inputs[1]
    if source is None or factor is None:
        return False
    first = add_before(to_heads, "Mul", [source, factor], "queries", source.shape)
    shape = scaled.outputs[0].shape
    turned = add_before(scores, "Transpose", [first], "queries", shape, perm=permutation(to_heads))
    scores.replace_input_with(0, turned)
    return True


def _scaled(softmax: ir.Node, index: int) -> tuple[ir.Node | None, ir.Node | None]:
    """The product in front, and what multiplies this factor of it, and nothing else, by one number."""
    scores = producer(softmax, 0, "MatMul")
    scaled = None if scores is None else producer(scores, index, "Mul")
    number = None if scaled is None or scaled.inputs[1] is None else scaled.inputs[1].const_value
    if scaled is None or number is None or number.size != 1 or len(list(scaled.outputs[0].uses())) != 1:
        return scores, None
    return scores, scaled
