"""Attention between many positions in bfloat16, for CPUs that multiply it twice as fast as float32.

Its two products have no weights and stay out of INT8. At 64 x 64 positions they take more of a step than all INT8
convolutions together; at few positions they are nothing, and are left as they are. On a CPU without bfloat16 the
session takes the casts out again.
"""

import onnx_ir as ir

from qdm_export.passes.base import cast
from qdm_export.passes.half_precision import BFLOAT16_OPSET

__all__ = ["LEAST_SCORES", "Bfloat16Attention"]

# Scores of one head, queries x keys, from which on its products are worth two casts: 16 x 16 positions.
LEAST_SCORES = 256 * 256
_HALF, _FLOAT = ir.DataType.BFLOAT16, ir.DataType.FLOAT


class Bfloat16Attention(ir.passes.InPlacePass):
    """Casts queries, keys and values, and the result back; what stands between must be one type to be fused.

    Args:
        least_scores: smallest number of queries x keys that is cast.
    """

    def __init__(self, least_scores: int) -> None:
        super().__init__()
        self._least = least_scores

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Cast in place; what has been cast is left as it is."""
        found = [products for node in list(model.graph) if (products := self._products(node)) is not None]
        casts: dict[ir.Value, ir.Value] = {}
        for scores, softmax, mixed in found:
            for product, places in ((scores, (0, 1)), (mixed, (1,))):
                for place in places:
                    taker, position = _first_mover(product, place)
                    value = taker.inputs[position]
                    if value is not None:
                        casts[value] = casts.get(value) or cast(taker, value, _HALF)
                        taker.replace_input_with(position, casts[value])
            for node in (scores, softmax, mixed):
                node.outputs[0].type = ir.TensorType(_HALF)
            readers = list(mixed.outputs[0].uses())
            back = cast(mixed, mixed.outputs[0], _FLOAT, after=True)
            for reader in readers:
                reader.node.replace_input_with(reader.idx, back)
        if found:
            model.graph.opset_imports[""] = max(model.graph.opset_imports[""], BFLOAT16_OPSET)
        return ir.passes.PassResult(model, modified=bool(found))

    def _products(self, softmax: ir.Node) -> tuple[ir.Node, ir.Node, ir.Node] | None:
        """Queries by keys, the softmax of them, and that by values; None where it is no attention, or a small one."""
        scores = softmax.inputs[0]
        if softmax.op_type != "Softmax" or scores is None or scores.dtype != _FLOAT or len(list(scores.uses())) != 1:
            return None
        producer, readers = scores.producer(), list(softmax.outputs[0].uses())
        if producer is None or producer.op_type != "MatMul" or len(readers) != 1:
            return None
        mixed = readers[0].node
        if mixed.op_type != "MatMul" or readers[0].idx != 0:
            return None
        queries, keys = _positions(scores), _positions(mixed.inputs[1])
        return (producer, softmax, mixed) if queries * keys >= self._least else None


def _first_mover(product: ir.Node, place: int) -> tuple[ir.Node, int]:
    """Who reads what is cast: the product, or the transpose right before it, which the plugin makes part of it."""
    value = product.inputs[place]
    moved = None if value is None else value.producer()
    if value is None or moved is None or moved.op_type != "Transpose" or len(list(value.uses())) != 1:
        return product, place
    value.type = ir.TensorType(_HALF)
    return moved, 0


def _positions(value: ir.Value | None) -> int:
    """The last axis but one; 0 where it is not known. Keys are counted in the values, whose shape survives export."""
    shape = None if value is None else value.shape
    size = 0 if shape is None else shape[-2]
    return size if isinstance(size, int) else 0
