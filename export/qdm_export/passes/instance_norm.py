"""GroupNormalization as Reshape, InstanceNormalization, Reshape, scale and shift, for ONNX Runtime's CPU provider.

It has no kernel for GroupNormalization and expands it into a dozen small nodes, shape arithmetic among them; it does
have one for InstanceNormalization, which is the same sum once a group's channels lie side by side.
"""

import math

import numpy as np
import onnx_ir as ir

from qdm_export.passes.group_norm import GroupNorm, GroupNormForm

__all__ = ["InstanceNormForm"]


class InstanceNormForm(GroupNormForm):
    """A group is an instance of its own."""

    def rewritten(self, norm: GroupNorm) -> ir.Value:
        """Normalized group by group, then scaled and shifted channel by channel."""
        groups, rows = norm.groups, norm.data.shape[0] if norm.data.shape is not None else None
        grouped_shape = [rows, groups, math.prod(norm.shape) // groups]
        to_groups = norm.constant(f"group_{groups}", np.array([0, groups, -1]))
        grouped = norm.add("Reshape", [norm.data, to_groups], "group", grouped_shape)
        ones = norm.constant(f"ones_{groups}", np.ones(groups, dtype=np.float32))
        zeros = norm.constant(f"zeros_{groups}", np.zeros(groups, dtype=np.float32))
        normal = norm.add(
            "InstanceNormalization", [grouped, ones, zeros], "normalize", grouped_shape, epsilon=norm.epsilon
        )
        back = norm.constant("shape_" + "x".join(map(str, norm.shape)), np.array([0, *norm.shape]))
        apart = norm.add("Reshape", [normal, back], "ungroup")
        rank = len(norm.shape)
        gamma = norm.constant(f"{norm.gamma}/{rank}d", norm.scale.reshape(norm.per_channel))
        beta = norm.constant(f"{norm.beta}/{rank}d", norm.bias.reshape(norm.per_channel))
        return norm.add("Add", [norm.add("Mul", [apart, gamma], "gamma"), beta], "beta")
