"""Per-channel factors: x / k before the layer, k in its weight columns."""

from collections.abc import Sequence

import onnx_ir as ir

from qdm_deploy.artifacts.plan import LayerPlan, QuantizationPlan
from qdm_export.passes.base import PlanPass, constant, insert_before, layer_groups
from qdm_export.topology import LayerNode

__all__ = ["ChannelFactors"]


class ChannelFactors(PlanPass):
    """Multiplies an input by 1 / k per channel. The weights follow in ``QuantizeWeights``, whose codes are of W * k.

    The multiply stands on the path into this layer only: a normalization that reads the same concatenation sees
    unscaled data. Unsigned targets need none where the quantize itself can have a scale per channel
    (``LayerPlan.axis_scale``, used in ``QuantizeInputs``).
    """

    def __init__(self, plan: QuantizationPlan, *, unsigned: bool) -> None:
        """Say which codes the target has."""
        super().__init__(plan)
        self.unsigned = unsigned

    def rewrite(self, model: ir.Model, layers: Sequence[tuple[LayerPlan, LayerNode]]) -> bool:
        """Insert one multiply per input with factors."""
        modified = False
        for group in layer_groups(layers):
            plan, first = group[0]
            if plan.inverse_k is None or (self.unsigned and plan.axis_scale is not None):
                continue
            shape = (1, -1, 1, 1) if first.kind == "conv" else (-1,)
            factor = constant(model, f"{first.name}/inverse_k", plan.inverse_k.reshape(shape))
            scaled = insert_before(first, "Mul", [factor], "scale_channels").outputs[0]
            for _, layer in group:
                layer.node.replace_input_with(0, scaled)
            modified = True
        return modified
