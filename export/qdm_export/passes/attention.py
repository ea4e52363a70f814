"""What the rewritings of attention share: how the exporter writes it, and how they find their way through it.

The exporter writes torch's scaled_dot_product_attention as ``softmax((a q) (b k)^T) v``: a Reshape and a Transpose each
take q, k and v apart into heads, and a chain of Reshape, Transpose, Reshape swaps the last two axes of the keys.
"""

import onnx_ir as ir

from qdm_export.passes.base import NodePass, NoMatch

__all__ = [
    "TO_HEADS",
    "AttentionPass",
    "heads_transpose",
    "keys_transpose",
    "one_reader",
    "permutation",
    "producer",
    "scaled_operand",
]

# [B, S, H, d] to [B, H, S, d].
TO_HEADS = (0, 2, 1, 3)


class AttentionPass(NodePass):
    """Rewrites attention; its places are the Softmax nodes."""

    def places(self, model: ir.Model) -> list[ir.Node]:
        """Every Softmax."""
        return [node for node in model.graph if node.op_type == "Softmax"]


def keys_transpose(keys: ir.Node) -> ir.Node:
    """The transpose into heads behind the exporter's chain that swaps the last two axes: reshape, transpose, reshape.

    The chain flattens batch and heads, whose shapes it computes, swaps, and takes them apart again.

    Args:
        keys: the node that scales them, the chain's reader.

    Raises:
        NoMatch: this is no such chain.
    """
    apart = producer(keys, 0, "Reshape", "its keys")
    swap = producer(apart, 0, "Transpose", "its keys")
    if permutation(swap) != (0, 2, 1):
        raise NoMatch(f"Transpose {swap.name} does not swap the last two axes of its keys")
    flat = producer(swap, 0, "Reshape", "its keys")
    return heads_transpose(flat, 0, "its keys")


def heads_transpose(node: ir.Node, index: int, what: str) -> ir.Node:
    """The Transpose [B, S, H, d] to [B, H, S, d] that makes an input of a node.

    Raises:
        NoMatch: something else makes it.
    """
    transpose = producer(node, index, "Transpose", what)
    if permutation(transpose) != TO_HEADS:
        raise NoMatch(f"Transpose {transpose.name} does not take {what} into heads")
    return transpose


def scaled_operand(softmax: ir.Node, index: int) -> tuple[ir.Node, ir.Node]:
    """The product in front of a Softmax, and the node that scales one operand of it, and nothing else, by one number.

    Args:
        softmax: of attention.
        index: 0 for queries, 1 for keys.

    Raises:
        NoMatch: there is no such product or multiplication.
    """
    what = ("its queries", "its keys")[index]
    scores = producer(softmax, 0, "MatMul", "its scores")
    scaled = producer(scores, index, "Mul", what)
    number = None if scaled.inputs[1] is None else scaled.inputs[1].const_value
    if number is None or number.size != 1:
        raise NoMatch(f"Mul {scaled.name} does not scale {what} by one number")
    if len(list(scaled.outputs[0].uses())) != 1:
        raise NoMatch(f"{what} have another reader")
    return scores, scaled


def producer(node: ir.Node, index: int, op_type: str, what: str) -> ir.Node:
    """The node that makes an input.

    Args:
        node: the reader.
        index: which input.
        op_type: of the node that is expected.
        what: name of the input in a sentence.

    Raises:
        NoMatch: another node makes it, or none.
    """
    value = node.inputs[index]
    made_by = None if value is None else value.producer()
    if made_by is None:
        raise NoMatch(f"no {op_type} makes {what}")
    if made_by.op_type != op_type:
        raise NoMatch(f"{made_by.op_type} {made_by.name} makes {what}, where a {op_type} is expected")
    return made_by


def one_reader(node: ir.Node, op_type: str, index: int, what: str) -> ir.Node:
    """The one node that reads a node's output, as its input ``index``.

    Raises:
        NoMatch: there are several, or it is another node or input.
    """
    readers = list(node.outputs[0].uses())
    if len(readers) != 1:
        raise NoMatch(f"{len(readers)} nodes read {what}")
    reader = readers[0].node
    if reader.op_type != op_type or readers[0].idx != index:
        raise NoMatch(f"{reader.op_type} {reader.name} reads {what}, where a {op_type} is expected")
    return reader


def permutation(transpose: ir.Node) -> tuple[int, ...]:
    """Of a Transpose; empty where it reverses the axes by default."""
    return tuple(transpose.attributes["perm"].as_ints()) if "perm" in transpose.attributes else ()
