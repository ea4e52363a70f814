"""QuantizeLinear and DequantizeLinear on the outputs of the planned convolutions, for ONNX Runtime.

Its CPU provider makes a Conv a QLinearConv only when the output is quantized too and the bias is int32 in units of the
product of the scales; without that the convolution runs in float32 behind two conversions. A QLinearConv has one
output scale, but its weights have one per channel: in units of each channel's own output step, every channel has the
scale 1, and only the DequantizeLinear behind the kernel, which may have a scale per channel, takes the steps back.
Zero points per channel go into the bias likewise. So each channel can use all 256 codes, and no operation is added.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qdm_deploy.artifacts.plan import LayerPlan
from qdm_deploy.errors import ExportError
from qdm_export.passes.base import (
    PlanPass,
    constant,
    insert_after,
    named_node,
    producer_of,
    require_integers,
    values_of,
)
from qdm_export.topology import LayerNode

__all__ = ["QuantizeOutputs"]


class QuantizeOutputs(PlanPass):
    """Right behind the kernel, before a gain and its bias: there one constant scale serves every timestep."""

    name = "outputs"

    def requires(self, model: ir.Model) -> None:
        """Weights are codes, whose scales this pass changes."""
        require_integers(model, self.plan, 1)

    def concerns(self, plan: LayerPlan) -> bool:
        """Whether it is a convolution."""
        return plan.layer.kind == "conv"

    def apply(self, model: ir.Model, layers: Sequence[tuple[LayerPlan, LayerNode]]) -> Iterable[str]:
        """Quantize bias and output of every planned convolution."""
        for plan, layer in layers:
            if not self.concerns(plan):
                continue
            if plan.output_scale is None or plan.output_zero_point is None:
                raise ExportError(f"the plan has no output scale for {plan.name}, which the onnxruntime target needs")
            self._rescale_weight(model, plan, layer, plan.output_scale)
            self._quantize_bias(model, plan, layer, plan.output_scale, plan.output_zero_point)
            one = constant(model, f"{layer.name}/output_unit", np.float32(1))
            middle = constant(model, f"{layer.name}/output_middle", np.uint8(128))
            shared = (plan.output_scale == plan.output_scale[0]) & (plan.output_zero_point == plan.output_zero_point[0])
            # Equal grids become one: most kernels are faster with a scalar.
            grids = 0 if shared.all() else slice(None)
            scales = constant(model, f"{layer.name}/output_scale", plan.output_scale[grids])
            zero_points = constant(model, f"{layer.name}/output_zero_point", plan.output_zero_point[grids])
            dequantize = insert_after(layer, "DequantizeLinear", [scales, zero_points], "dequantize_output", axis=1)
            quantize = insert_after(layer, "QuantizeLinear", [one, middle], "quantize_output")
            quantize.outputs[0].dtype = ir.DataType.UINT8
            dequantize.replace_input_with(0, quantize.outputs[0])
            yield layer.name

    def _rescale_weight(
        self, model: ir.Model, plan: LayerPlan, layer: LayerNode, output_scale: NDArray[np.float32]
    ) -> None:
        """Weights in units of the outputs' steps."""
        scale = constant(model, f"{layer.name}/weight_output_scale", plan.weight_scales / output_scale)
        producer_of(layer.node.inputs[1]).replace_input_with(1, scale)

    def _quantize_bias(
        self,
        model: ir.Model,
        plan: LayerPlan,
        layer: LayerNode,
        output_scale: NDArray[np.float32],
        zero_point: NDArray[np.uint8],
    ) -> None:
        unit = plan.weight_scales * np.float32(plan.scale)
        shift = (zero_point.astype(np.float32) - 128) * output_scale
        bias = layer.node.inputs[2] if len(layer.node.inputs) > 2 else None
        if bias is not None:
            shift = shift + values_of(bias)
        codes = np.rint(shift / unit)
        limit = np.iinfo(np.int32)
        if np.abs(codes).max() > limit.max:
            raise ExportError(f"the bias of {plan.name} does not fit 32 bits at scale {plan.scale:.3g}")
        operands = [
            constant(model, f"{layer.name}/bias_codes", codes.astype(np.int32)),
            constant(model, f"{layer.name}/bias_scale", unit / output_scale),
        ]
        node = named_node(layer, "DequantizeLinear", operands, "dequantize_bias", {"axis": 0})
        model.graph.insert_before(layer.node, node)
        layer.node.resize_inputs(3)
        layer.node.replace_input_with(2, node.outputs[0])
