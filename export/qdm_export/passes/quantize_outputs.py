"""QuantizeLinear and DequantizeLinear on the outputs of the planned convolutions, for ONNX Runtime.

Its CPU provider makes a Conv a QLinearConv only when the output is quantized too and the bias is int32 in units of the
product of the scales; without that the convolution runs in float32 behind two conversions.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qdm_deploy.artifacts.plan import LayerPlan
from qdm_deploy.errors import ExportError
from qdm_export.passes.base import PlanPass, constant, insert_after, values_of
from qdm_export.topology import LayerNode

__all__ = ["QuantizeOutputs"]


class QuantizeOutputs(PlanPass):
    """Right behind the kernel, before a gain and its bias: there one constant scale serves every timestep."""

    def rewrite(self, model: ir.Model, layers: Sequence[tuple[LayerPlan, LayerNode]]) -> bool:
        """Quantize bias and output of every planned convolution."""
        modified = False
        for plan, layer in layers:
            if layer.kind != "conv":
                continue
            if plan.output_scale is None or plan.output_zero_point is None:
                raise ExportError(f"the plan has no output scale for {plan.name}, which the onnxruntime target needs")
            if layer.bias is not None:
                self._quantize_bias(model, plan, layer, layer.bias)
            scale = constant(model, f"{layer.name}/output_scale", np.float32(plan.output_scale))
            zero_point = constant(model, f"{layer.name}/output_zero_point", np.uint8(plan.output_zero_point))
            dequantize = insert_after(layer, "DequantizeLinear", [scale, zero_point], "dequantize_output")
            quantize = insert_after(layer, "QuantizeLinear", [scale, zero_point], "quantize_output")
            quantize.outputs[0].dtype = ir.DataType.UINT8
            dequantize.replace_input_with(0, quantize.outputs[0])
            modified = True
        return modified

    def _quantize_bias(self, model: ir.Model, plan: LayerPlan, layer: LayerNode, bias: ir.Value) -> None:
        unit = plan.weight_scales * np.float32(plan.scale)
        codes = np.rint(values_of(bias) / unit)
        limit = np.iinfo(np.int32)
        if np.abs(codes).max() > limit.max:
            raise ExportError(f"the bias of {plan.name} does not fit 32 bits at scale {plan.scale:.3g}")
        name = f"{layer.name}/dequantize_bias"
        output = ir.Value(name=name, shape=bias.shape, type=ir.TensorType(ir.DataType.FLOAT))
        node = ir.node(
            "DequantizeLinear",
            [
                constant(model, f"{layer.name}/bias_codes", codes.astype(np.int32)),
                constant(model, f"{layer.name}/bias_scale", unit.astype(np.float32)),
            ],
            {"axis": 0},
            outputs=[output],
            name=name,
            metadata_props=dict(layer.node.metadata_props),
        )
        model.graph.insert_before(layer.node, node)
        layer.node.replace_input_with(2, output)
