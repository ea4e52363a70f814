"""Per-channel factors: x / k before the layer, k in its weight columns."""

from collections.abc import Iterable, Sequence
from typing import Self

import onnx_ir as ir

from qdm_deploy.artifacts.plan import LayerPlan, QuantizationPlan
from qdm_export.passes.base import (
    PlanPass,
    Settings,
    constant,
    insert_before,
    layer_groups,
    require_float_inputs,
)
from qdm_export.topology import LayerNode

__all__ = ["ChannelFactors"]


class ChannelFactors(PlanPass):
    """Multiplies an input by 1 / k per channel. The weights follow in ``QuantizeWeights``, whose codes are of W * k.

    The multiply stands on the path into this layer only: a normalization that reads the same concatenation sees
    unscaled data. Unsigned targets need none where the quantize itself can have a scale per channel
    (``LayerPlan.axis_scale``, used in ``QuantizeInputs``).
    """

    name = "channel factors"

    def __init__(self, plan: QuantizationPlan, *, unsigned: bool) -> None:
        """Say which codes the target has."""
        super().__init__(plan)
        self.unsigned = unsigned

    @classmethod
    def made(cls, settings: Settings) -> Self:
        """For the target's codes."""
        return cls(settings.plan, unsigned=settings.unsigned)

    def requires(self, model: ir.Model) -> None:
        """Nothing is quantized yet."""
        require_float_inputs(model, self.plan)

    def concerns(self, plan: LayerPlan) -> bool:
        """Whether an operation has to divide its input."""
        return plan.inverse_k is not None and not (self.unsigned and plan.axis_scale is not None)

    def apply(self, model: ir.Model, layers: Sequence[tuple[LayerPlan, LayerNode]]) -> Iterable[str]:
        """Insert one multiply per input with factors."""
        for group in layer_groups(layers):
            plan, first = group[0]
            if plan.inverse_k is None or not self.concerns(plan):
                continue
            shape = (1, -1, 1, 1) if first.kind == "conv" else (-1,)
            factor = constant(model, f"{first.name}/inverse_k", plan.inverse_k.reshape(shape))
            scaled = insert_before(first, "Mul", [factor], "scale_channels").outputs[0]
            for _, layer in group:
                layer.node.replace_input_with(0, scaled)
                yield layer.name
