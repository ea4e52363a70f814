"""What the rewritings of attention share: how the exporter writes it, and how they find their way through it."""

import onnx_ir as ir

__all__ = ["TO_HEADS", "keys_transpose", "permutation", "producer"]

# [B, S, H, d] to [B, H, S, d].
TO_HEADS = (0, 2, 1, 3)


def keys_transpose(keys: ir.Node) -> ir.Node | None:
    """The transpose into heads behind the exporter's chain that swaps the last two axes: reshape, transpose, reshape.

    The chain flattens batch and heads, whose shapes it computes, swaps, and takes them apart again.

    Args:
        keys: the node that scales them, the chain's reader.

    Returns:
        That transpose; None where this is no such chain.
    """
    apart = producer(keys, 0, "Reshape")
    swap = None if apart is None else producer(apart, 0, "Transpose")
    flat = None if swap is None else producer(swap, 0, "Reshape")
    if swap is None or flat is None or permutation(swap) != (0, 2, 1):
        return None
    to_heads = producer(flat, 0, "Transpose")
    return to_heads if to_heads is not None and permutation(to_heads) == TO_HEADS else None


def producer(node: ir.Node, index: int, op_type: str) -> ir.Node | None:
    """The node that makes an input, if it is of this type."""
    value = node.inputs[index]
    made_by = None if value is None else value.producer()
    if made_by is None or made_by.op_type != op_type:
        return None
    return made_by


def permutation(transpose: ir.Node) -> tuple[int, ...]:
    """Of a Transpose; empty where it reverses the axes by default."""
    return tuple(transpose.attributes["perm"].as_ints()) if "perm" in transpose.attributes else ()
