"""What the rewritings of GroupNormalization share: which nodes they take, and how they add nodes in its place."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qdm_export.passes.base import NodePass, NoMatch, add_before, graph_of

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


class GroupNormForm(NodePass):
    """Rewrites every GroupNormalization."""

    name = "norms"

    def places(self, model: ir.Model) -> list[ir.Node]:
        """Every GroupNormalization."""
        return [node for node in model.graph if node.op_type == "GroupNormalization"]

    def at(self, model: ir.Model, node: ir.Node) -> None:
        """Put the other form in its place."""
        node.outputs[0].replace_all_uses_with(self.rewritten(_described(node)))
        model.graph.remove(node, safe=True)

    def rewritten(self, norm: GroupNorm) -> ir.Value:
        """The value that takes the place of the norm's output."""
        raise NotImplementedError


def _described(node: ir.Node) -> GroupNorm:
    data, scale, bias = node.inputs
    if data is None or data.shape is None:
        raise NoMatch("its input has no known shape")
    if scale is None or bias is None or scale.const_value is None or bias.const_value is None:
        raise NoMatch("its scale and bias are not constants")
    sizes = list(data.shape)[1:]
    if not all(isinstance(size, int) for size in sizes):
        raise NoMatch(f"its input has the shape {data.shape}, which is not static behind the batch")
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
