"""What the rewritings of GroupNormalization share: which nodes they take, and how they add nodes in its place."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qdm_export.passes.base import add_before, graph_of

__all__ = ["GroupNorm", "GroupNormForm"]


@dataclass(frozen=True)
class GroupNorm:
    """A GroupNormalization with constant scale and bias [C] and a static shape behind the batch.

    Attributes:
        node: the node.
        data: its input [B, C, ...].
        shape: [C, ...].
        groups: number of groups.
        epsilon: added to the variance.
        gamma, beta: names of scale and bias.
        scale, bias: their numbers [C].
    """

    node: ir.Node
    data: ir.Value
    shape: tuple[int, ...]
    groups: int
    epsilon: float
    gamma: str
    beta: str
    scale: NDArray[np.float32]
    bias: NDArray[np.float32]

    @property
    def channels(self) -> int:
        """C."""
        return self.shape[0]

    @property
    def positions(self) -> int:
        """Elements of one channel of one row."""
        return math.prod(self.shape[1:])

    @property
    def per_channel(self) -> tuple[int, ...]:
        """The shape that lines a vector over the channels up with the data."""
        return (1, self.channels, *([1] * (len(self.shape) - 1)))

    def add(self, op_type: str, inputs: Sequence[ir.Value], label: str, shape: Sequence[object] | None = None,
            **attributes: float | int) -> ir.Value:  # fmt: skip
        """A node before the norm, named after it; ``shape`` is that of its result, the data's own by default."""
        sizes = self.data.shape if shape is None else ir.Shape(shape)  # type: ignore[arg-type]
        return add_before(self.node, op_type, inputs, label, sizes, **attributes)

    def constant(self, name: str, values: NDArray[np.generic]) -> ir.Value:
        """An initializer, shared by all norms that ask for this name."""
        graph = graph_of(self.node)
        if name not in graph.initializers:
            tensor = ir.tensor(values, name=name)
            shape, kind = ir.Shape(values.shape), ir.TensorType(tensor.dtype)
            graph.register_initializer(ir.Value(name=name, shape=shape, type=kind, const_value=tensor))
        return graph.initializers[name]


class GroupNormForm(ir.passes.InPlacePass):
    """Rewrites every GroupNormalization that ``GroupNorm`` describes; others stay as they are."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place."""
        modified = False
        for node in list(model.graph):
            norm = _described(node) if node.op_type == "GroupNormalization" else None
            if norm is not None:
                node.outputs[0].replace_all_uses_with(self.rewritten(norm))
                model.graph.remove(node, safe=True)
                modified = True
        return ir.passes.PassResult(model, modified=modified)

    def rewritten(self, norm: GroupNorm) -> ir.Value:
        """The value that takes the place of the norm's output."""
        raise NotImplementedError


def _described(node: ir.Node) -> GroupNorm | None:
    data, scale, bias = node.inputs
    if data is None or scale is None or bias is None or data.shape is None:
        return None
    sizes = list(data.shape)[1:]
    if scale.const_value is None or bias.const_value is None or not all(isinstance(size, int) for size in sizes):
        return None
    return GroupNorm(
        node=node,
        data=data,
        shape=tuple(int(size) for size in sizes if isinstance(size, int)),
        groups=node.attributes["num_groups"].as_int(),
        epsilon=node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5,
        gamma=str(scale.name),
        beta=str(bias.name),
        scale=scale.const_value.numpy(),
        bias=bias.const_value.numpy(),
    )
