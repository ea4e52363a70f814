"""Zero offsets on symmetric kernels: quantize x - z s, and add what the layer makes of the constant z s.

A convolution is linear and pads with zeros, so conv(x) = conv(x - c) + conv(c) holds exactly, borders included, when
both pad with zeros. The second term is a constant: per channel where nothing is padded, a map [1, O, H, W] where the
border sees fewer taps. It is computed from the weight codes, in float64, so it carries no error of its own. Where the
subtraction is in half precision, c is what z s becomes there: the identity holds for any c, and one that is added back
should be the one that was taken away.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Self

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qdm_deploy.artifacts.plan import LayerPlan, QuantizationPlan
from qdm_deploy.artifacts.topology import Layer
from qdm_export.passes.base import (
    PlanPass,
    Settings,
    constant,
    insert_after,
    insert_before,
    layer_groups,
    require_float_inputs,
    values_of,
)
from qdm_export.topology import LayerNode

__all__ = ["ZeroOffsets", "offset_map"]

_FLOAT32 = np.dtype(np.float32)


def offset_map(plan: LayerPlan, offset: float) -> NDArray[np.float64]:
    """What the layer makes of an input that is ``offset`` everywhere: [O] unpadded, else [1, O, H', W']."""
    weight = plan.codes.astype(np.float64) * plan.weight_scales.astype(np.float64).reshape(
        -1, *([1] * (plan.codes.ndim - 1))
    )
    layer = plan.layer
    if layer.spatial is None or not any(layer.pads):
        per_channel: NDArray[np.float64] = offset * weight.reshape(len(weight), -1).sum(axis=1)
        return per_channel
    rows, columns = (_taps(layer, axis, size) for axis, size in enumerate(layer.spatial))
    # sum over taps (i, j) that fall inside the input, for every output position: rows [H', kh], columns [W', kw].
    total: NDArray[np.float64] = np.einsum("oij,hi,wj->ohw", weight.sum(axis=1), rows, columns)
    return offset * total[None]


def _taps(layer: Layer, axis: int, size: int) -> NDArray[np.float64]:
    """[outputs, kernel]: 1 where the tap reads the input, 0 where it reads padding."""
    kernel, stride = layer.weight_shape[2 + axis], layer.strides[axis]
    before, after = layer.pads[axis], layer.pads[2 + axis]
    outputs = (size + before + after - kernel) // stride + 1
    position = np.arange(outputs)[:, None] * stride + np.arange(kernel)[None] - before
    return ((position >= 0) & (position < size)).astype(np.float64)


class ZeroOffsets(PlanPass):
    """Inserts the subtraction, and the constant behind the kernel or, where it is per channel, in the bias.

    Args:
        plan: with the offsets.
        dtype: what the subtraction will be computed in.
    """

    name = "zero offsets"

    def __init__(self, plan: QuantizationPlan, dtype: "np.dtype[Any]" = _FLOAT32) -> None:
        super().__init__(plan)
        self._dtype = dtype

    @classmethod
    def made(cls, settings: Settings) -> Self:
        """In the type of the target's rest."""
        return cls(settings.plan, settings.rest.numpy())

    def requires(self, model: ir.Model) -> None:
        """Nothing is quantized yet."""
        require_float_inputs(model, self.plan)

    def concerns(self, plan: LayerPlan) -> bool:
        """Whether its grid has an offset."""
        return plan.zero_offset != 0

    def apply(self, model: ir.Model, layers: Sequence[tuple[LayerPlan, LayerNode]]) -> Iterable[str]:
        """Rewrite every input whose grid has an offset."""
        for group in layer_groups(layers):
            plan, first = group[0]
            if not self.concerns(plan):
                continue
            offset = (np.float32(plan.zero_offset) * np.float32(plan.scale)).astype(self._dtype).astype(np.float32)
            shift = constant(model, f"{first.name}/offset", offset)
            shifted = insert_before(first, "Sub", [shift], "subtract_offset").outputs[0]
            for layer_plan, layer in group:
                layer.node.replace_input_with(0, shifted)
                self._add_back(model, layer_plan, layer, float(offset))
                yield layer.name

    def _add_back(self, model: ir.Model, plan: LayerPlan, layer: LayerNode, offset: float) -> None:
        """Add the constant; a bias that stands right at the kernel is merged with it, which makes it free."""
        term = offset_map(plan, offset)
        per_channel = term.ndim == 1
        if layer.bias is not None and layer.bias.const_value is not None:
            bias = values_of(layer.bias).astype(np.float64)
            merged = term + (bias if per_channel else bias.reshape(1, -1, 1, 1))
            if per_channel:
                value = constant(model, f"{layer.name}/bias_and_offset", merged.astype(np.float32))
                holder = layer.bias_add or layer.node
                holder.replace_input_with(list(holder.inputs).index(layer.bias), value)
                return
            layer.node.replace_input_with(2, None)
            term = merged
        if per_channel and layer.kind == "conv":
            term = term.reshape(1, -1, 1, 1)
        insert_after(
            layer, "Add", [constant(model, f"{layer.name}/offset_map", term.astype(np.float32))], "add_offset_map"
        )
