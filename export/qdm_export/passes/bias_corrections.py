"""Corrections of biases, before any other pass: those then see the corrected bias, wherever they move it."""

from collections.abc import Iterable, Sequence

import onnx_ir as ir

from qdm_deploy.artifacts.plan import LayerPlan
from qdm_export.passes.base import PlanPass, constant, insert_after, values_of
from qdm_export.topology import LayerNode

__all__ = ["BiasCorrections"]


class BiasCorrections(PlanPass):
    """Adds each correction to the layer's bias; a layer without a bias gets one."""

    name = "bias corrections"

    def concerns(self, plan: LayerPlan) -> bool:
        """Whether its bias is corrected."""
        return plan.bias_correction is not None

    def apply(self, model: ir.Model, layers: Sequence[tuple[LayerPlan, LayerNode]]) -> Iterable[str]:
        """Replace the bias of every corrected layer."""
        for plan, layer in layers:
            bias = plan.corrected(None if layer.bias is None else values_of(layer.bias))
            if plan.bias_correction is None or bias is None:
                continue
            value = constant(model, f"{layer.name}/corrected_bias", bias)
            if layer.bias is not None:
                holder = layer.bias_add or layer.node
                holder.replace_input_with(list(holder.inputs).index(layer.bias), value)
            elif layer.node.op_type == "MatMul":
                insert_after(layer, "Add", [value], "add_bias_correction")
            else:
                layer.node.resize_inputs(3)
                layer.node.replace_input_with(2, value)
            yield plan.name
