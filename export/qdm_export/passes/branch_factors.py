"""Per-branch scales at skip concatenations: x / k before the layer, k in its weight columns."""

from collections.abc import Sequence

import onnx_ir as ir

from qdm_deploy.artifacts.plan import LayerPlan
from qdm_export.passes.base import PlanPass, constant, insert_before, layer_groups
from qdm_export.topology import LayerNode

__all__ = ["BranchFactors"]


class BranchFactors(PlanPass):
    """Multiplies an input by 1 / k per channel. The weights follow in ``QuantizeWeights``, whose codes are of W * k.

    The multiply stands on the path into this layer only: a normalization that reads the same concatenation sees
    unscaled data.
    """

    def rewrite(self, model: ir.Model, layers: Sequence[tuple[LayerPlan, LayerNode]]) -> bool:
        """Insert one multiply per input with factors."""
        modified = False
        for group in layer_groups(layers):
            plan, first = group[0]
            if plan.inverse_k is None:
                continue
            shape = (1, -1, 1, 1) if first.kind == "conv" else (-1,)
            factor = constant(model, f"{first.name}/inverse_k", plan.inverse_k.reshape(shape))
            scaled = insert_before(first, "Mul", [factor], "scale_branches").outputs[0]
            for _, layer in group:
                layer.node.replace_input_with(0, scaled)
            modified = True
        return modified
