"""Attention between many positions in bfloat16, for CPUs that multiply it twice as fast as float32.

Its two products have no weights and stay out of INT8. At 64 x 64 positions they take more of a step than all INT8
convolutions together; at few positions they are nothing, and are left as they are. On a CPU without bfloat16 the
session takes the casts out again.
"""

from typing import Self

import onnx_ir as ir

from qdm_export.passes.attention import AttentionPass, one_reader, producer
from qdm_export.passes.base import LeftAlone, NoMatch, Settings, cast
from qdm_export.passes.half_precision import BFLOAT16_OPSET

__all__ = ["LEAST_SCORES", "Bfloat16Attention"]

# Scores of one head, queries x keys, from which on its products are worth two casts: 16 x 16 positions.
LEAST_SCORES = 256 * 256
_HALF, _FLOAT = ir.DataType.BFLOAT16, ir.DataType.FLOAT


class Bfloat16Attention(AttentionPass):
    """Casts queries, keys and values, and the result back; what stands between must be one type to be fused.

    Args:
        least_scores: smallest number of queries x keys that is cast.
    """

    name = "bfloat16 attention"

    def __init__(self, least_scores: int = LEAST_SCORES) -> None:
        super().__init__()
        self._least = least_scores

    @classmethod
    def made(cls, settings: Settings) -> Self:
        """With the limit of the settings."""
        return cls(settings.least_scores)

    def at(self, model: ir.Model, node: ir.Node) -> None:
        """Cast the operands of both products."""
        scores = producer(node, 0, "MatMul", "its scores")
        mixed = one_reader(node, "MatMul", 0, "its result")
        if scores.outputs[0].dtype != _FLOAT or len(list(scores.outputs[0].uses())) != 1:
            raise NoMatch("its scores are not float32, or have another reader")
        queries, keys = _positions(scores.outputs[0]), _positions(mixed.inputs[1])
        if queries * keys < self._least:
            raise LeftAlone(f"{queries} x {keys} positions are too few to be worth it")
        casts: dict[ir.Value, ir.Value] = {}
        for product, places in ((scores, (0, 1)), (mixed, (1,))):
            for place in places:
                taker, position = _first_mover(product, place)
                value = taker.inputs[position]
                if value is not None:
                    casts[value] = casts.get(value) or cast(taker, value, _HALF)
                    taker.replace_input_with(position, casts[value])
        for each in (scores, node, mixed):
            each.outputs[0].type = ir.TensorType(_HALF)
        readers = list(mixed.outputs[0].uses())
        back = cast(mixed, mixed.outputs[0], _FLOAT, after=True)
        for reader in readers:
            reader.node.replace_input_with(reader.idx, back)
        model.graph.opset_imports[""] = max(model.graph.opset_imports[""], BFLOAT16_OPSET)


def _first_mover(product: ir.Node, place: int) -> tuple[ir.Node, int]:
    """Who reads what is cast: the product, or the transpose right before it, which the plugin makes part of it."""
    value = product.inputs[place]
    moved = None if value is None else value.producer()
    if value is None or moved is None or moved.op_type != "Transpose" or len(list(value.uses())) != 1:
        return product, place
    value.type = ir.TensorType(_HALF)
    return moved, 0


def _positions(value: ir.Value | None) -> int:
    """The last axis but one. Keys are counted in the values, whose shape survives export."""
    shape = None if value is None else value.shape
    size = None if shape is None else shape[-2]
    if not isinstance(size, int):
        raise NoMatch("the number of its positions is not known")
    return size
