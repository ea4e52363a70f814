"""GroupNormalization from its moments, in the layout of the convolutions, for OpenVINO's CPU plugin.

The plugin computes the norm on tensors whose channels come first, and its convolutions want them last: each norm costs
a reorder before and one behind. Here only sums over the positions touch the large tensor, in any layout; what belongs
to groups happens on [B, groups, channels of a group]. Scale and shift then fuse with SiLU and the quantize that follow.

A group's variance is its mean square less the square of its mean, from two sums that both read the tensor as it is.
They are float32 also where the tensor is bfloat16. The difference costs digits where a mean is large beside its spread:
88 dB of the norm's output are left at 30 times the spread, 68 dB at 100 times.
"""

from typing import Any

import numpy as np
import onnx_ir as ir

from qdm_export.metadata import CENTRED_KEY
from qdm_export.passes.group_norm import GroupNorm, GroupNormForm
from qdm_export.passes.projections import behind_reshapes

__all__ = ["MomentsNormForm"]


class MomentsNormForm(GroupNormForm):
    """Mean and length of every channel, of them mean and mean square of every group, one multiply and one add.

    What a residual block adds to every position of a channel alike, its time embedding, is added to the mean instead.
    """

    def rewritten(self, norm: GroupNorm) -> ir.Value:
        """y = (x - mean) gamma / sqrt(variance + epsilon) + beta, as one multiply and one add."""
        data, shift = _without_shift(norm)
        channels = _Channels(norm, data)
        if shift is None:
            mean, mean_square = channels.of_groups()
        else:
            vector = behind_reshapes(shift)
            centred = vector.metadata_props.get(CENTRED_KEY) == str(norm.groups)
            shift = channels.in_groups(vector, "shift")
            mean, mean_square = channels.of_shifted_groups(shift, centred=centred)
        whole, each = channels.whole, channels.each

        squared_mean = norm.add("Mul", [mean, mean], "squared_mean", whole)
        # Rounding may leave a constant group less than nothing.
        variance = norm.add("Sub", [mean_square, squared_mean], "variance", whole)
        variance = norm.add("Relu", [variance], "positive", whole)
        epsilon = norm.constant(f"epsilon_{norm.epsilon:g}", np.array(norm.epsilon, dtype=np.float32))
        half = norm.constant("minus_half", np.array(-0.5, dtype=np.float32))
        spread = norm.add("Pow", [norm.add("Add", [variance, epsilon], "epsilon", whole), half], "spread", whole)
        gamma = norm.constant(f"{norm.gamma}/groups", norm.scale.reshape(channels.constant_shape))
        scale = norm.add("Mul", [gamma, spread], "scale", each)
        # Minus the mean, to be added: the plugin makes a negation of its own of a subtraction at the end of a chain.
        if shift is None:
            minus = np.full(channels.constant_shape, -1, dtype=np.float32)
            minus_one = norm.constant(f"minus_{norm.groups}x{minus.shape[-1]}", minus)
            below = norm.add("Mul", [mean, minus_one], "minus_mean", each)
        else:
            below = norm.add("Sub", [shift, mean], "minus_mean", each)
        beta = norm.constant(f"{norm.beta}/groups", norm.bias.reshape(channels.constant_shape))
        offset = norm.add("Add", [norm.add("Mul", [below, scale], "scaled_mean", each), beta], "offset", each)
        scaled = norm.add("Mul", [data, channels.back(scale, "channel_scale")], "gamma")
        # The offset first: the plugin orders operations by first operands, and makes scale and offset in one kernel if
        # nothing that reads the scale comes in between.
        return norm.add("Add", [channels.back(offset, "channel_offset"), scaled], "beta")


class _Channels:
    """Mean and length over the positions of every channel, as [B, groups, channels of a group]."""

    def __init__(self, norm: GroupNorm, data: ir.Value) -> None:
        rows = None if data.shape is None else data.shape[0]
        self.norm, self.size = norm, norm.channels // norm.groups
        self.constant_shape = (1, norm.groups, self.size)
        self.whole, self.each = [rows, norm.groups, 1], [rows, norm.groups, self.size]
        self._rows = rows
        over_positions = norm.constant(f"positions_{len(norm.shape)}d", np.arange(2, len(norm.shape) + 1))

        def over(op_type: str, label: str) -> ir.Value:
            flat = [rows, norm.channels]
            value = norm.add(op_type, [data, over_positions], f"channel_{label}", flat, keepdims=0)
            return self.in_groups(value, label)

        self.mean, self.length = over("ReduceMean", "mean"), over("ReduceL2", "length")

    def of_groups(self) -> tuple[ir.Value, ir.Value]:
        """Mean and mean square of every group, [B, groups, 1]."""
        length = self._over_group("ReduceL2", self.length, "group_length")
        return self._over_group("ReduceMean", self.mean, "group_mean"), self._mean_square(length, self.whole, self.size)

    def of_shifted_groups(self, shift: ir.Value, *, centred: bool) -> tuple[ir.Value, ir.Value]:
        """The same of x + t, where t is the same at every position: (x + t)^2 = x^2 + t (2 x + t)."""
        add = self.norm.add
        shifted = add("Add", [self.mean, shift], "mean_of_sum", self.each)
        mean = self._over_group("ReduceMean", self.mean if centred else shifted, "group_mean")
        cross = add("Mul", [shift, add("Add", [self.mean, shifted], "twice_mean", self.each)], "cross", self.each)
        square = add("Add", [self._mean_square(self.length, self.each), cross], "square_of_sum", self.each)
        return mean, self._over_group("ReduceMean", square, "group_mean_square")

    def in_groups(self, value: ir.Value, label: str) -> ir.Value:
        """[B, C] as [B, groups, channels of a group]."""
        shape = self.norm.constant(f"groups_{self.norm.groups}", np.array([0, self.norm.groups, -1]))
        return self.norm.add("Reshape", [value, shape], label, self.each)

    def back(self, value: ir.Value, label: str) -> ir.Value:
        """Such a value lined up with the data."""
        sizes = self.norm.per_channel[1:]
        shape = self.norm.constant(f"channels_{self.norm.channels}_{len(self.norm.shape)}d", np.array([0, *sizes]))
        return self.norm.add("Reshape", [value, shape], label, [self._rows, *sizes])

    def _over_group(self, op_type: str, value: ir.Value, label: str) -> ir.Value:
        axis = self.norm.constant("over_group", np.array([2]))
        return self.norm.add(op_type, [value, axis], label, self.whole, keepdims=1)

    def _mean_square(self, length: ir.Value, shape: list[Any], channels: int = 1) -> ir.Value:
        count = self.norm.positions * channels
        divisor = self.norm.constant(f"count_{count}", np.array(count, dtype=np.float32))
        square = self.norm.add("Mul", [length, length], "square", shape)
        return self.norm.add("Div", [square, divisor], "mean_square", shape)


def _without_shift(norm: GroupNorm) -> tuple[ir.Value, ir.Value | None]:
    """The data before a vector over the channels is added to it, and that vector, where nobody else reads the sum."""
    total = norm.data
    add = total.producer()
    if add is None or add.op_type != "Add" or len(list(total.uses())) != 1 or total.is_graph_output():
        return total, None
    for data, shift in (add.inputs, reversed(add.inputs)):
        if data is None or shift is None or data.shape != total.shape or shift.shape is None:
            continue
        if list(shift.shape)[1:] == list(norm.per_channel)[1:] and norm.positions > 1:
            return data, shift
    return total, None
