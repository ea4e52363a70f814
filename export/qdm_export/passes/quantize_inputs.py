"""QuantizeLinear and DequantizeLinear on the inputs of the planned layers."""

from collections.abc import Iterable, Sequence
from typing import Self

import numpy as np
import onnx_ir as ir

from qdm_deploy.artifacts.plan import LayerPlan, QuantizationPlan
from qdm_export.passes.base import PlanPass, Settings, constant, insert_before, layer_groups, require_integers
from qdm_export.topology import LayerNode

__all__ = ["QuantizeInputs"]


class QuantizeInputs(PlanPass):
    """One grid per shared input tensor.

    Signed: zero point 0 and one QuantizeLinear per tensor with a DequantizeLinear per reader, as TensorRT fuses best.
    Unsigned: u8 codes with zero point 128 - z, and a QuantizeLinear per reader, which is what ONNX Runtime fuses.
    """

    name = "inputs"

    def __init__(self, plan: QuantizationPlan, *, unsigned: bool) -> None:
        """Choose the codes: u8 with a zero point, or s8."""
        super().__init__(plan)
        self.unsigned = unsigned

    @classmethod
    def made(cls, settings: Settings) -> Self:
        """For the target's codes."""
        return cls(settings.plan, unsigned=settings.unsigned)

    def ensures(self, model: ir.Model) -> None:
        """Every INT8 layer reads codes."""
        require_integers(model, self.plan, 0)

    def apply(self, model: ir.Model, layers: Sequence[tuple[LayerPlan, LayerNode]]) -> Iterable[str]:
        """Insert the pairs."""
        for group in layer_groups(layers):
            plan, first = group[0]
            scale = constant(model, f"{first.name}/scale", np.float32(plan.scale))
            code = np.uint8(plan.zero_point_u8) if self.unsigned else np.int8(0)
            zero_point = constant(model, f"{first.name}/zero_point", code)
            codes: ir.Value | None = None
            for _, layer in group:
                if codes is None or self.unsigned:
                    quantize = self._quantize(model, plan, first, layer, scale, zero_point)
                    codes = quantize.outputs[0]
                    codes.dtype = ir.DataType.UINT8 if self.unsigned else ir.DataType.INT8
                dequantize = insert_before(layer, "DequantizeLinear", [scale, zero_point], "dequantize")
                dequantize.replace_input_with(0, codes)
                layer.node.replace_input_with(0, dequantize.outputs[0])
                yield layer.name

    def _quantize(
        self,
        model: ir.Model,
        plan: LayerPlan,
        first: LayerNode,
        layer: LayerNode,
        scale: ir.Value,
        zero_point: ir.Value,
    ) -> ir.Node:
        if not self.unsigned or plan.axis_scale is None:
            return insert_before(layer, "QuantizeLinear", [scale, zero_point], "quantize")
        # Dividing by k happens inside: codes of x / k on the one scale that the kernel and the dequantize know.
        per_channel = constant(model, f"{first.name}/axis_scale", plan.axis_scale)
        points = np.full(len(plan.axis_scale), plan.zero_point_u8, dtype=np.uint8)
        same_points = constant(model, f"{first.name}/axis_zero_point", points)
        return insert_before(layer, "QuantizeLinear", [per_channel, same_points], "quantize", axis=1)
