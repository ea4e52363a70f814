"""INT8 weight initializers behind a DequantizeLinear, per output channel."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qdm_deploy.artifacts.plan import LayerPlan
from qdm_deploy.errors import ExportError
from qdm_export.passes.base import PlanPass, constant
from qdm_export.topology import LayerNode, weight_is_transposed

__all__ = ["QuantizeWeights"]


class QuantizeWeights(PlanPass):
    """Replaces each float weight by the plan's codes, in the layout the node reads."""

    def rewrite(self, model: ir.Model, layers: Sequence[tuple[LayerPlan, LayerNode]]) -> bool:
        """Replace every planned weight."""
        for plan, layer in layers:
            transposed = weight_is_transposed(layer.node)
            expected = plan.codes.T.shape if transposed else plan.codes.shape
            if layer.weight.shape != expected:
                raise ExportError(
                    f"the plan is not of this graph: its codes for {plan.name} have shape {expected}, the weight there "
                    f"{layer.weight.shape}"
                )
            codes = constant(model, f"{layer.name}/weight_codes", plan.codes.T if transposed else plan.codes)
            scale = constant(model, f"{layer.name}/weight_scale", plan.weight_scales)
            zero = constant(model, f"{layer.name}/weight_zero_point", np.zeros(len(plan.weight_scales), dtype=np.int8))
            name = f"{layer.name}/dequantize_weight"
            output = ir.Value(name=name, shape=codes.shape, type=ir.TensorType(ir.DataType.FLOAT))
            node = ir.node(
                "DequantizeLinear",
                [codes, scale, zero],
                {"axis": 1 if transposed else 0},
                outputs=[output],
                name=name,
                metadata_props=dict(layer.node.metadata_props),
            )
            model.graph.insert_before(layer.node, node)
            layer.node.replace_input_with(1, output)
            layer.node.name = layer.name
        return bool(layers)
