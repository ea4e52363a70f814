"""Layers whose weight rounding is learned: AdaRound (Nagel et al. 2020, equations 21 to 25).

A weight W k lies between two codes; instead of the nearer one, take the one that makes the block's output right. The
choice is a number h in [0, 1] per weight that starts at the fractional part and is driven to 0 or 1.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from qdm_calibration.ranges import weight_levels
from qdm_deploy.artifacts.plan import ACTIVATION_LEVELS, LayerPlan

__all__ = ["RoundedLayer"]

_ZETA, _GAMMA = 1.1, -0.1  # equation 23: the sigmoid is stretched, so that h reaches 0 and 1 exactly


class RoundedLayer(nn.Module):
    """A Conv2d or Linear that computes with the plan's weight codes in floating point.

    The rounding is soft, and differentiable in ``alpha``, between ``begin`` and ``end``. Activations are quantized as
    deployed where ``quantize_input`` is set: straight-through in the backward pass, so ``scale`` can be learned too.
    """

    weight: Tensor
    time_bin: Tensor
    bias: Tensor | None
    inverse_k: Tensor | None
    inverse_r: Tensor | None

    def __init__(self, module: nn.Module, plan: LayerPlan) -> None:
        """Take ``module``'s place with the codes of ``plan``."""
        super().__init__()
        self.plan, self.module_kind = plan, plan.layer.kind
        self.qmax = weight_levels(plan.weight_bits)
        weight = module.get_parameter("weight").detach()
        tail = [1] * (weight.ndim - 2)
        if plan.inverse_k is not None:
            weight = weight / torch.from_numpy(plan.inverse_k).reshape(1, -1, *tail)
        self.unit = torch.from_numpy(plan.weight_scales).reshape(-1, 1, *tail)
        self.steps = weight / self.unit  # W k in units of w
        self.codes = torch.from_numpy(plan.codes).float()
        self.alpha: Tensor | None = None
        self.bias = module.bias.detach() if isinstance(module.bias, Tensor) else None
        self.stride, self.padding = getattr(module, "stride", 1), getattr(module, "padding", 0)
        axes = [1, -1, *tail] if plan.layer.kind == "conv" else [-1]
        self.inverse_k = None if plan.inverse_k is None else torch.from_numpy(plan.inverse_k).reshape(axes)
        self.inverse_r = None if plan.inverse_r is None else torch.from_numpy(plan.inverse_r)
        self.scale = torch.tensor(plan.scale)
        self.quantize_input = False

    def begin(self) -> Tensor:
        """Make the rounding soft; returns alpha, to be optimized."""
        fraction = self.steps - self.steps.floor()
        self.alpha = (-torch.log((_ZETA - _GAMMA) / (fraction - _GAMMA) - 1)).requires_grad_()
        return self.alpha

    def end(self) -> None:
        """Round hard to what was learned."""
        if self.alpha is not None:
            self.codes = (self.steps.floor() + (self.alpha.detach() >= 0)).clamp_(-self.qmax, self.qmax)
        self.alpha = None

    def round_to_nearest(self) -> None:
        """Round hard to the plan's own codes."""
        self.codes, self.alpha = torch.from_numpy(self.plan.codes).float(), None

    def choice(self) -> Tensor:
        """h, in [0, 1], of every weight (equation 23)."""
        if self.alpha is None:
            raise ValueError(f"the rounding of {self.plan.name} is not soft; call begin first")
        return (torch.sigmoid(self.alpha) * (_ZETA - _GAMMA) + _GAMMA).clamp(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's result for x [B, ...]."""
        codes = self.codes
        if self.alpha is not None:
            codes = (self.steps.floor() + self.choice()).clamp(-self.qmax, self.qmax)
        if self.inverse_k is not None:
            x = x * self.inverse_k
        if self.quantize_input:
            x = self._quantized(x)
        weight = codes * self.unit
        if self.module_kind == "conv":
            return functional.conv2d(x, weight, self.bias, self.stride, self.padding)
        return functional.linear(x, weight, self.bias)

    def _quantized(self, x: Tensor) -> Tensor:
        gain = None
        if self.inverse_r is not None:
            gain = self.inverse_r[self.time_bin].reshape(-1, *([1] * (x.ndim - 1)))
            x = x * gain
        steps = x / self.scale
        rounded = steps + (steps.round() - steps).detach()
        z = self.plan.zero_offset
        x = ((rounded - z).clamp(*ACTIVATION_LEVELS) + z) * self.scale
        return x if gain is None else x / gain

    def numpy_codes(self) -> "np.ndarray[tuple[int, ...], np.dtype[np.int8]]":
        """The codes, int8, in PyTorch's layout."""
        return self.codes.to(torch.int8).numpy()
