"""GroupNormalization from its moments, in the layout of the convolutions, for OpenVINO's CPU plugin.

The plugin computes the norm on tensors whose channels come first, and its convolutions want them last: each norm costs
a reorder before and one behind. Here only sums over the positions touch the large tensor, in any layout; what belongs
to groups happens on [B, groups, channels of a group]. Scale and shift then fuse with SiLU and the quantize that follow.

A channel's variance is its mean square less the square of its mean, from two sums that both read the tensor as it is;
a group's adds how far the means of its channels lie apart. Sums are float32 also where the tensor is bfloat16. The
difference costs digits where a channel's mean is large beside its spread: 88 dB of the norm's output are left at 30
times the spread, 68 dB at 100 times.
"""

import numpy as np
import onnx_ir as ir

from qdm_export.passes.group_norm import GroupNorm, GroupNormForm
from qdm_export.passes.time_projections import CENTRED, behind_reshapes

__all__ = ["MomentsNormForm"]


class MomentsNormForm(GroupNormForm):
    """Mean and mean square of every channel, what belongs to groups, one multiply and one add.

    What a residual block adds to every position of a channel alike, its time embedding, is added to the mean instead.
    """

    def rewritten(self, norm: GroupNorm) -> ir.Value:
        """y = (x - mean) gamma / sqrt(variance + epsilon) + beta, as one multiply and one add."""
        data, shift = _without_shift(norm)
        rows, size = (None if data.shape is None else data.shape[0]), norm.channels // norm.groups
        flat, whole, each = [rows, norm.channels], [rows, norm.groups, 1], [rows, norm.groups, size]
        over_positions = norm.constant(f"positions_{len(norm.shape)}d", np.arange(2, len(norm.shape) + 1))
        over_group = norm.constant("over_group", np.array([2]))
        to_groups = norm.constant(f"groups_{norm.groups}", np.array([0, norm.groups, -1]))
        to_channels = norm.constant(
            f"channels_{norm.channels}_{len(norm.shape)}d", np.array([0, *norm.per_channel[1:]])
        )

        def in_groups(value: ir.Value, label: str) -> ir.Value:
            return norm.add("Reshape", [value, to_groups], label, each)

        def of_channel(op_type: str, label: str) -> ir.Value:
            return in_groups(norm.add(op_type, [data, over_positions], f"channel_{label}", flat, keepdims=0), label)

        def group_mean(value: ir.Value, label: str) -> ir.Value:
            return norm.add("ReduceMean", [value, over_group], label, whole, keepdims=1)

        def channelwise(value: ir.Value, label: str) -> ir.Value:
            return norm.add("Reshape", [value, to_channels], label, [rows, *norm.per_channel[1:]])

        own_mean, length = of_channel("ReduceMean", "mean"), of_channel("ReduceL2", "length")
        mean = own_mean
        centred = False
        if shift is not None:
            centred = behind_reshapes(shift).meta.get(CENTRED) == norm.groups
            shift = in_groups(behind_reshapes(shift), "shift")
            mean = norm.add("Add", [own_mean, shift], "mean_of_sum", each)
        middle = group_mean(own_mean if centred else mean, "group_mean")

        # Of a group: the mean of its channels' own variances, and the variance of their means.
        count = norm.constant(f"count_{norm.positions}", np.array(norm.positions, dtype=np.float32))
        square = norm.add("Div", [norm.add("Mul", [length, length], "square", each), count], "mean_square", each)
        own = norm.add("Sub", [square, norm.add("Mul", [own_mean, own_mean], "squared_mean", each)], "within", each)
        own = norm.add("Relu", [own], "positive", each)  # rounding may leave a constant channel less than nothing
        distance = norm.add("Sub", [mean, middle], "distance", each)
        between = norm.add("Mul", [distance, distance], "between", each)
        epsilon = norm.constant(f"epsilon_{norm.epsilon:g}", np.array(norm.epsilon, dtype=np.float32))
        both = norm.add("Add", [norm.add("Add", [own, between], "deviation", each), epsilon], "epsilon", each)
        gamma = norm.constant(f"{norm.gamma}/groups", norm.scale.reshape(1, norm.groups, size))
        half = norm.constant("minus_half", np.array(-0.5, dtype=np.float32))
        spread = norm.add("Pow", [group_mean(both, "variance"), half], "spread", whole)
        scale = norm.add("Mul", [gamma, spread], "scale", each)
        # Minus the mean, to be added: the plugin makes a negation of its own of a subtraction at the end of a chain.
        if shift is None:
            minus = norm.constant(f"minus_{norm.groups}x{size}", np.full((1, norm.groups, size), -1, dtype=np.float32))
            below = norm.add("Mul", [middle, minus], "minus_mean", each)
        else:
            below = norm.add("Sub", [shift, middle], "minus_mean", each)
        beta = norm.constant(f"{norm.beta}/groups", norm.bias.reshape(1, norm.groups, size))
        offset = norm.add("Add", [norm.add("Mul", [below, scale], "scaled_mean", each), beta], "offset", each)
        scaled = norm.add("Mul", [data, channelwise(scale, "channel_scale")], "gamma")
        return norm.add("Add", [scaled, channelwise(offset, "channel_offset")], "beta")


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
