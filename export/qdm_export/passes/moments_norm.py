"""GroupNormalization from its moments, in the layout of the convolutions, for OpenVINO's CPU plugin.

The plugin computes the norm on tensors whose channels come first, and its convolutions want them last: each norm costs
a reorder before and one behind. Here only sums over the positions touch the large tensor, in any layout; what belongs
to groups happens on [B, groups, channels of a group]. Scale and shift then fuse with SiLU and the quantize that follow.

The variance is that of the centred values, a second pass over the tensor: the mean of squares less the square of the
mean needs one, and loses digits where a group's mean is large beside its spread (all of them in bfloat16).
"""

import numpy as np
import onnx_ir as ir

from qdm_export.passes.group_norm import GroupNorm, GroupNormForm

__all__ = ["MomentsNormForm"]


class MomentsNormForm(GroupNormForm):
    """Mean, centred values, variance, one multiply and one add.

    What a residual block adds to every position of a channel alike, its time embedding, is added to the mean instead.
    """

    def rewritten(self, norm: GroupNorm) -> ir.Value:
        """y = (x - mean) gamma / sqrt(variance + epsilon) + beta."""
        data, shift = _without_shift(norm)
        rows, size = (None if data.shape is None else data.shape[0]), norm.channels // norm.groups
        whole, each = [rows, norm.groups, 1], [rows, norm.groups, size]
        over_positions = norm.constant(f"positions_{len(norm.shape)}d", np.arange(2, len(norm.shape) + 1))
        over_group = norm.constant("over_group", np.array([2]))
        to_groups = norm.constant(f"groups_{norm.groups}", np.array([0, norm.groups, -1]))
        to_channels = norm.constant(
            f"channels_{norm.channels}_{len(norm.shape)}d", np.array([0, *norm.per_channel[1:]])
        )

        def of_group(op_type: str, value: ir.Value, label: str) -> ir.Value:
            flat = norm.add(op_type, [value, over_positions], f"channel_{label}", [rows, norm.channels], keepdims=0)
            flat = norm.add("Reshape", [flat, to_groups], f"{label}_in_groups", each)
            return norm.add(op_type, [flat, over_group], f"group_{label}", whole, keepdims=1)

        def channelwise(value: ir.Value, label: str) -> ir.Value:
            return norm.add("Reshape", [value, to_channels], label, [rows, *norm.per_channel[1:]])

        # Minus the mean, to be added: the plugin makes a negation of its own of every subtraction.
        mean = of_group("ReduceMean", data, "mean")
        if shift is None:
            minus = norm.constant(f"minus_{norm.groups}x{size}", np.full((1, norm.groups, size), -1, dtype=np.float32))
            below = norm.add("Mul", [mean, minus], "minus_mean", each)
        else:
            shift = norm.add("Reshape", [shift, to_groups], "shift", each)
            mean_shift = norm.add("ReduceMean", [shift, over_group], "mean_shift", whole, keepdims=1)
            mean = norm.add("Add", [mean, mean_shift], "mean_of_sum", whole)
            below = norm.add("Sub", [shift, mean], "minus_mean", each)
        centred = norm.add("Add", [data, channelwise(below, "minus_mean_by_channel")], "centred")

        length = of_group("ReduceL2", centred, "length")
        count = norm.constant(f"count_{size * norm.positions}", np.array(size * norm.positions, dtype=np.float32))
        variance = norm.add("Div", [norm.add("Mul", [length, length], "square", whole), count], "variance", whole)
        epsilon = norm.constant(f"epsilon_{norm.epsilon:g}", np.array(norm.epsilon, dtype=np.float32))
        spread = norm.add("Sqrt", [norm.add("Add", [variance, epsilon], "epsilon", whole)], "spread", whole)
        gamma = norm.constant(f"{norm.gamma}/groups", norm.scale.reshape(1, norm.groups, size))
        scale = channelwise(norm.add("Div", [gamma, spread], "scale", each), "channel_scale")
        beta = norm.constant(f"{norm.beta}/{len(norm.shape)}d", norm.bias.reshape(norm.per_channel))
        return norm.add("Add", [norm.add("Mul", [centred, scale], "gamma"), beta], "beta")


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
