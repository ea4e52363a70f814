"""What quantization needs to know of a network's structure, read once from the exported graph.

It is the only thing calibration learns about the graph, so that ranges, plans and simulations need no ONNX.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

__all__ = ["Layer", "Topology"]


@dataclass(frozen=True)
class Layer:
    """One convolution or matrix product with a weight.

    Attributes:
        name: module path in the U-Net, such as "down_blocks.0.resnets.0.conv1".
        kind: "conv" (weight [O, I, kh, kw], input [B, I, H, W]) or "linear" (weight [O, I], input [B, ..., I]).
        weight_shape: shape of the weight as PyTorch stores it.
        input_group: name of the first layer that reads the same input tensor; layers of a group share their codes.
        branches: channels of each skip-concatenation branch in the input, in order; one entry where there is no concat.
        normalized: whether a normalization stands between the last residual tensor and this input.
        strides, pads: of the convolution, (h, w) and (top, left, bottom, right); empty for "linear".
        spatial: (H, W) of the input of a convolution; None for "linear".
        absorber: what takes a factor per channel of this input at no cost, going by the graph: "norm" (scale and bias
            of the normalization before it: any factor), "weights" (layers that make it: powers of two, so that their
            weight scales stay exact); None where it needs an operation, or where something else reads the input too.
        float_reason: why the layer stays in floating point whatever the plan wants; None where INT8 is possible.
        feeds_norm: whether the output goes to a normalization and nowhere else, but for an addition per channel.
        upsampled: whether it is a 3x3 convolution that alone reads a nearest-neighbour upsampling by two.
    """

    name: str
    kind: Literal["conv", "linear"]
    weight_shape: tuple[int, ...]
    input_group: str
    branches: tuple[int, ...]
    normalized: bool
    strides: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    spatial: tuple[int, int] | None = None
    float_reason: str | None = None
    feeds_norm: bool = False
    upsampled: bool = False
    absorber: Literal["norm", "weights"] | None = None

    @property
    def in_channels(self) -> int:
        """Channels of the input."""
        return self.weight_shape[1]

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return self.weight_shape[0]

    @property
    def reads_concat(self) -> bool:
        """Whether the input is made of several skip-concatenation branches."""
        return len(self.branches) > 1


@dataclass(frozen=True)
class Topology:
    """The layers of a U-Net in execution order."""

    layers: tuple[Layer, ...]

    def __iter__(self) -> Iterator[Layer]:
        """Layers in execution order."""
        return iter(self.layers)

    def __len__(self) -> int:
        """Number of layers, float ones included."""
        return len(self.layers)

    def layer(self, name: str) -> Layer:
        """The layer of that name; KeyError where there is none."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)

    @property
    def candidates(self) -> tuple[Layer, ...]:
        """The layers that may become INT8."""
        return tuple(layer for layer in self.layers if layer.float_reason is None)

    def groups(self) -> dict[str, tuple[Layer, ...]]:
        """INT8 candidates by the input tensor they share, in execution order."""
        groups: dict[str, list[Layer]] = {}
        for layer in self.candidates:
            groups.setdefault(layer.input_group, []).append(layer)
        return {key: tuple(layers) for key, layers in groups.items()}
