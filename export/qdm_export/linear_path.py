"""Where a factor per channel on a tensor can go instead: backwards, through what is linear, into constants.

From the tensor towards its producers, a factor passes whatever only moves, adds, resizes or mixes rows of a tensor
(attention is linear in its values), and ends in the scale and bias of a normalization or in the weight and bias of a
layer. It ends nowhere where something nonlinear stands in between, or where a tensor on the way has another reader,
which would see it scaled. The factor travels as an array of the tensor's rank with 1 on every axis it is constant
along, so that splitting and joining attention heads is followed by really reshaping it.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

__all__ = ["LinearPath", "Site", "linear_path"]

Factor = NDArray[np.float64]


@dataclass(frozen=True)
class Site:
    """A constant input of a node that takes the factor; ``factor`` broadcasts to the constant."""

    node: ir.Node
    index: int
    factor: Factor


@dataclass(frozen=True)
class LinearPath:
    """Everything that has to be multiplied so that a tensor comes out multiplied.

    Attributes:
        sites: the constants.
        layers: the Conv, Gemm and MatMul nodes among their owners, with the factor of each output channel, [O].
    """

    sites: tuple[Site, ...] = ()
    layers: Mapping[ir.Node, Factor] = field(default_factory=dict)

    def joined(self, other: "LinearPath") -> "LinearPath":
        """Both."""
        return LinearPath(self.sites + other.sites, {**self.layers, **other.layers})


def linear_path(value: ir.Value, factor: Factor) -> LinearPath | None:
    """The constants to multiply so that ``value`` is multiplied by ``factor`` and nothing else changes.

    Args:
        value: the tensor; who reads it is the caller's business.
        factor: of the tensor's rank, with size 1 on the axes it is constant along (the batch always).

    Returns:
        None where there is no such path.
    """
    node = value.producer()
    sizes = _sizes(value)
    if node is None or sizes is None or not _fits(factor, sizes) or value is not node.outputs[0]:
        return None
    step = _STEPS.get(node.op_type)
    return None if step is None else step(node, factor)


def _before(value: ir.Value | None, factor: Factor) -> LinearPath | None:
    """The path from a tensor in the middle, which nothing else may read."""
    if value is None or len(list(value.uses())) != 1 or value.is_graph_output():
        return None
    return linear_path(value, factor)


def _pass(node: ir.Node, factor: Factor) -> LinearPath | None:
    return _before(node.inputs[0], factor)


def _resize(node: ir.Node, factor: Factor) -> LinearPath | None:
    # A channel that is resized itself would mix factors; _fits refuses it one tensor further on.
    return _before(node.inputs[0], factor)


def _transpose(node: ir.Node, factor: Factor) -> LinearPath | None:
    if "perm" not in node.attributes:
        return None
    order = [int(axis) for axis in node.attributes["perm"].as_ints()]
    return _before(node.inputs[0], np.transpose(factor, np.argsort(order)))


def _reshape(node: ir.Node, factor: Factor) -> LinearPath | None:
    old, new = _sizes(node.inputs[0]), _sizes(node.outputs[0])
    if old is None or new is None or math.prod(old) != math.prod(new):
        return None
    reshaped = np.broadcast_to(factor, new).reshape(old)
    for axis in range(reshaped.ndim):
        first = reshaped.take([0], axis)
        if (reshaped == first).all():
            reshaped = first
    return _before(node.inputs[0], reshaped)


def _matmul(node: ir.Node, factor: Factor) -> LinearPath | None:
    right = node.inputs[1]
    if right is None or any(size != 1 for size in factor.shape[1 if _constant(right) else -2 : -1]):
        return None
    if _constant(right):
        return _layer(node, factor, {1: factor.reshape(-1)}) if factor.ndim > 1 else None
    return _before(right, factor)  # rows are mixed by the left operand, columns stay


def _conv(node: ir.Node, factor: Factor) -> LinearPath | None:
    if factor.ndim < 2 or factor.size != factor.shape[1]:
        return None
    return _layer(node, factor, {1: factor.reshape(-1, *([1] * (factor.ndim - 1))), 2: factor.reshape(-1)})


def _gemm(node: ir.Node, factor: Factor) -> LinearPath | None:
    transposed = "transB" in node.attributes and node.attributes["transB"].as_int() == 1
    return _layer(node, factor, {1: factor.reshape((-1, 1) if transposed else (1, -1)), 2: factor.reshape(-1)})


def _layer(node: ir.Node, factor: Factor, factors: Mapping[int, Factor]) -> LinearPath | None:
    sites = _sites(node, factors)
    weight = node.inputs[1]
    if sites is None or weight is None or weight.shape is None:
        return None
    return LinearPath(sites, {node: factor.reshape(-1)})


def _group_norm(node: ir.Node, factor: Factor) -> LinearPath | None:
    return _norm(node, factor, axis=1)


def _layer_norm(node: ir.Node, factor: Factor) -> LinearPath | None:
    return _norm(node, factor, axis=factor.ndim - 1)


def _norm(node: ir.Node, factor: Factor, *, axis: int) -> LinearPath | None:
    scale = node.inputs[1]
    # Before opset 21 a GroupNormalization has a scale per group.
    if factor.ndim <= axis or factor.size != factor.shape[axis] or scale is None or scale.const_value is None:
        return None
    if tuple(scale.const_value.shape) != (factor.size,):
        return None
    sites = _sites(node, {1: factor.reshape(-1), 2: factor.reshape(-1)})
    return None if sites is None else LinearPath(sites)


def _add(node: ir.Node, factor: Factor) -> LinearPath | None:
    path = LinearPath()
    for index, value in enumerate(node.inputs):
        if value is None:
            return None
        found: LinearPath | None
        if _constant(value):
            found = LinearPath((Site(node, index, _as_constant(factor, value)),))
        else:
            found = _before(value, factor)
        if found is None:
            return None
        path = path.joined(found)
    return path


def _by_constant(node: ir.Node, factor: Factor) -> LinearPath | None:
    """x * c or x / c."""
    left, right = node.inputs[0], node.inputs[1]
    if right is not None and _constant(right):
        return _before(left, factor)
    if node.op_type == "Mul" and left is not None and _constant(left):
        return _before(right, factor)
    return None


_STEPS: dict[str, Callable[[ir.Node, Factor], LinearPath | None]] = {
    "Identity": _pass,
    "Resize": _resize,
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Add": _add,
    "Mul": _by_constant,
    "Div": _by_constant,
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Conv": _conv,
    "GroupNormalization": _group_norm,
    "LayerNormalization": _layer_norm,
}


def _sites(node: ir.Node, factors: Mapping[int, Factor]) -> tuple[Site, ...] | None:
    """The node's constant inputs that are there; None if one of them is computed."""
    present = [(index, factor) for index, factor in factors.items() if len(node.inputs) > index]
    values = [node.inputs[index] for index, _ in present]
    if any(value is not None and not _constant(value) for value in values):
        return None
    return tuple(
        Site(node, index, factor) for (index, factor), value in zip(present, values, strict=True) if value is not None
    )


def _constant(value: ir.Value) -> bool:
    return value.is_initializer() and value.const_value is not None


def _as_constant(factor: Factor, value: ir.Value) -> Factor:
    """The factor in the constant's rank where that says the same, so that a bias stays one."""
    rank = 0 if value.shape is None else len(value.shape)
    leading = factor.shape[: factor.ndim - rank]
    return factor.reshape(factor.shape[len(leading) :]) if all(size == 1 for size in leading) else factor


def _sizes(value: ir.Value | None) -> tuple[int, ...] | None:
    """The tensor's sizes for a batch of one; None where one behind the batch is not static."""
    if value is None or value.shape is None or len(value.shape) == 0:
        return None
    inner = list(value.shape)[1:]
    static = [size for size in inner if isinstance(size, int)]
    return (1, *static) if len(static) == len(inner) else None


def _fits(factor: Factor, sizes: tuple[int, ...]) -> bool:
    return factor.ndim == len(sizes) and all(have in (1, size) for have, size in zip(factor.shape, sizes, strict=True))
