"""The plan in PyTorch, with the same integers as a target.

Every INT8 layer is replaced by one that computes the codes the target computes, multiplies them as integers (held in
floating point: a product of codes is at most 2**14, and sums stay exact below 2**24 in float32, 2**53 in float64) and
scales the result. What stays float in the plan stays float32 here; a float16 engine adds its own rounding on top.

``onnxruntime`` also quantizes the bias and the output of its convolutions; ``openvino`` and ``tensorrt`` do not.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from qdm_calibration.layers import layer_of, put_layer, sharing_copy
from qdm_deploy.artifacts.plan import ACTIVATION_LEVELS, TARGETS, LayerPlan, QuantizationPlan, Target
from qdm_deploy.errors import InputError

__all__ = ["Simulation", "quantized_layer", "simulate"]


class Simulation(nn.Module):
    """A network whose INT8 layers run the plan: same signature and output as the network it was made from."""

    bin_of_timestep: Tensor
    output_correction: Tensor | None

    def __init__(self, network: nn.Module, plan: QuantizationPlan) -> None:
        """Wrap a network whose layers are already replaced by those of ``plan``."""
        super().__init__()
        self.network = network
        self.register_buffer("bin_of_timestep", torch.from_numpy(plan.bin_of_timestep()))
        correction = None if plan.output_correction is None else torch.from_numpy(plan.output_correction)
        self.register_buffer("output_correction", correction)

    def forward(self, sample: Tensor, timestep: Tensor, **conditioning: Tensor) -> Tensor:
        """Output [B, C, H, W] for ``sample`` and ``timestep`` [B]; each row uses the gains of its own timestep."""
        whole = timestep.long()
        rows = self.bin_of_timestep[whole]
        for module in self.network.modules():
            if isinstance(module, _QuantizedLayer):
                module.time_bin = rows
        output: Tensor = self.network(sample, timestep, **conditioning)
        if self.output_correction is None:
            return output
        shift, gain, share = self.output_correction[whole][..., None, None].unbind(1)
        # A learned variance stands behind the predicted noise; nothing of the sample is in it.
        known = torch.cat([sample] * (output.shape[1] // sample.shape[1]), dim=1)
        return (output - shift - share * known) / (1 + gain)


def simulate(
    network: nn.Module,
    plan: QuantizationPlan,
    target: Target,
    *,
    dtype: torch.dtype = torch.float32,
) -> Simulation:
    """A copy of ``network`` that runs ``plan`` as ``target`` does; float weights are shared with the original.

    Args:
        network: takes (sample, timestep, **conditioning).
        plan: what to run.
        target: whose arithmetic.
        dtype: what integers are held in; float64 makes every integer sum exact.

    Raises:
        InputError: an unknown target.
    """
    if target not in TARGETS:
        raise InputError(f"target {target!r} is not known; choose one of {', '.join(TARGETS)}")
    twin = sharing_copy(network)
    for layer in plan.quantized:
        put_layer(twin, layer.name, quantized_layer(layer_of(twin, layer.name), layer, target, dtype=dtype))
    return Simulation(twin.eval(), plan).eval()


def quantized_layer(
    module: nn.Module, plan: LayerPlan, target: Target, *, dtype: torch.dtype = torch.float32
) -> "_QuantizedLayer":
    """The layer that replaces ``module`` (Conv2d or Linear)."""
    if isinstance(module, nn.Conv2d):
        return _QuantizedConv(module, plan, target, dtype)
    return _QuantizedLinear(module, plan, target, dtype)


class _QuantizedLayer(nn.Module):
    """Codes in, integer product, scales out."""

    # Where codes are clipped. Targets have these; an experiment may simulate fewer.
    levels = ACTIVATION_LEVELS
    # Of each row; whoever runs a layer with gains sets it first.
    time_bin: Tensor
    weight_codes: Tensor
    weight_scale: Tensor
    inverse_k: Tensor | None
    inverse_r: Tensor | None
    axis_scale: Tensor | None
    output_scale: Tensor | None
    output_zero_point: Tensor | None
    bias: Tensor | None

    def __init__(self, module: nn.Module, plan: LayerPlan, target: Target, dtype: torch.dtype) -> None:
        super().__init__()
        self.plan, self.target, self.dtype = plan, target, dtype
        self.float_dtype = module.get_parameter("weight").dtype
        # As int8: the copy in ``dtype`` that a product needs lives no longer than it.
        self.register_buffer("weight_codes", torch.from_numpy(plan.codes))
        self.register_buffer("weight_scale", self._per_channel(plan.weight_scales))
        self.register_buffer("inverse_k", None if plan.inverse_k is None else self._per_channel(plan.inverse_k))
        axis_scale = None if target == "tensorrt" else plan.axis_scale
        self.register_buffer("axis_scale", None if axis_scale is None else self._per_channel(axis_scale))
        inverse_r = None if plan.inverse_r is None else torch.from_numpy(plan.inverse_r)
        self.register_buffer("inverse_r", inverse_r)
        scale, zero_point = (plan.output_scale, plan.output_zero_point) if target == "onnxruntime" else (None, None)
        self.register_buffer("output_scale", None if scale is None else self._per_channel(scale))
        zeros = None if zero_point is None else self._per_channel(zero_point.astype(np.float32))
        self.register_buffer("output_zero_point", zeros)
        bias = module.bias.detach().numpy() if isinstance(module.bias, Tensor) else None
        self.register_buffer("bias", None if bias is None else self._per_channel(bias))

    def codes(self, x: Tensor) -> Tensor:
        """Activation codes q for x, in the order of operations of the target."""
        plan, (low, high) = self.plan, self.levels
        if self.axis_scale is not None:
            return (x / self.axis_scale).round_().sub_(plan.zero_offset).clamp_(low, high)
        if self.inverse_k is not None:
            x = x * self.inverse_k
        if self.inverse_r is not None:
            x = x * self._gain(self.inverse_r, x)
        if self.target != "tensorrt":
            # u8 codes with a zero point; the same grid, and the same codes but for rounding ties
            return (x / plan.scale).round_().sub_(plan.zero_offset).clamp_(low, high)
        shift = np.float32(plan.zero_offset) * np.float32(plan.scale)
        return (x - float(shift)).div_(plan.scale).round_().clamp_(low, high)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's result for x, in x's dtype."""
        # In place from here on: every tensor is fresh, and passes over memory are most of what a simulation costs.
        integers = self.product(self.codes(x).add_(self.plan.zero_offset).to(self.dtype))
        unit = (self.weight_scale * float(np.float32(self.plan.scale))).to(self.dtype)
        if self.output_scale is not None and self.output_zero_point is not None:
            y = self._requantized(integers, unit, self.output_scale, self.output_zero_point)
        else:
            y = integers.mul_(unit)
            if self.inverse_r is None and self.bias is not None:
                y.add_(self.bias)
        if self.inverse_r is not None:
            y.div_(self._gain(self.inverse_r, y))
            if self.bias is not None:
                y.add_(self.bias)
        return y.to(self.float_dtype)

    def _requantized(self, integers: Tensor, unit: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Bias and zero point as integers in units of the product, then u8 codes of the result, as QLinearConv does."""
        shift = (zero_point - 128.0) * scale
        if self.inverse_r is None and self.bias is not None:
            shift = shift + self.bias
        integers.add_(torch.round(shift / unit))
        codes = integers.mul_(unit / scale).round_().add_(128).clamp_(0, 255)
        return codes.sub_(zero_point).mul_(scale)

    def product(self, integers: Tensor) -> Tensor:
        raise NotImplementedError

    def _per_channel(self, values: NDArray[np.float32]) -> Tensor:
        raise NotImplementedError

    def _gain(self, inverse_r: Tensor, like: Tensor) -> Tensor:
        return inverse_r[self.time_bin].reshape(-1, *([1] * (like.ndim - 1)))


class _QuantizedConv(_QuantizedLayer):
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str

    def __init__(self, module: nn.Conv2d, plan: LayerPlan, target: Target, dtype: torch.dtype) -> None:
        super().__init__(module, plan, target, dtype)
        self.stride, self.padding = module.stride, module.padding

    def product(self, integers: Tensor) -> Tensor:
        # Zero padding pads q + z with 0, which is the code of 0.0: the offset's border term is already in it.
        return functional.conv2d(integers, self.weight_codes.to(self.dtype), None, self.stride, self.padding)

    def _per_channel(self, values: NDArray[np.float32]) -> Tensor:
        return torch.from_numpy(values).reshape(1, -1, 1, 1)


class _QuantizedLinear(_QuantizedLayer):
    def product(self, integers: Tensor) -> Tensor:
        return functional.linear(integers, self.weight_codes.to(self.dtype))

    def _per_channel(self, values: NDArray[np.float32]) -> Tensor:
        return torch.from_numpy(values)
