"""Weight codes as initializers behind a DequantizeLinear, per output channel.

Codes of 4 bits are stored as INT4, two to a byte, behind a Cast to INT8 where a runtime folds that Cast when it loads
the graph: the codes take half the space on disk, and the kernels get the INT8 weights that they know.
"""

from collections.abc import Iterable, Sequence
from typing import Self

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qdm_deploy.artifacts.plan import LayerPlan, QuantizationPlan
from qdm_deploy.errors import ExportError
from qdm_export.passes.base import PlanPass, Settings, constant, named_node, require_integers
from qdm_export.topology import LayerNode, weight_is_transposed

__all__ = ["QuantizeWeights"]


class QuantizeWeights(PlanPass):
    """Replaces each float weight by the plan's codes, in the layout the node reads."""

    name = "weights"

    def __init__(self, plan: QuantizationPlan, *, packed: bool = False) -> None:
        """Store codes of 4 bits as INT4 (``packed``), or as INT8 like all others."""
        super().__init__(plan)
        self.packed = packed

    @classmethod
    def made(cls, settings: Settings) -> Self:
        """With codes packed where the target reads them."""
        return cls(settings.plan, packed=settings.packed_weights)

    def ensures(self, model: ir.Model) -> None:
        """Every INT8 layer reads codes."""
        require_integers(model, self.plan, 1)

    def apply(self, model: ir.Model, layers: Sequence[tuple[LayerPlan, LayerNode]]) -> Iterable[str]:
        """Replace every planned weight."""
        for plan, layer in layers:
            transposed = weight_is_transposed(layer.node)
            expected = plan.codes.T.shape if transposed else plan.codes.shape
            if layer.weight.shape != expected:
                raise ExportError(
                    f"the plan is not of this graph: its codes for {plan.name} have shape {expected}, the weight there "
                    f"{layer.weight.shape}"
                )
            codes = self._codes(model, plan, layer, plan.codes.T if transposed else plan.codes)
            scale = constant(model, f"{layer.name}/weight_scale", plan.weight_scales)
            zero = constant(model, f"{layer.name}/weight_zero_point", np.zeros(len(plan.weight_scales), dtype=np.int8))
            axis = {"axis": 1 if transposed else 0}
            node = named_node(layer, "DequantizeLinear", [codes, scale, zero], "dequantize_weight", axis)
            model.graph.insert_before(layer.node, node)
            layer.node.replace_input_with(1, node.outputs[0])
            layer.node.name = layer.name
            yield layer.name

    def _codes(self, model: ir.Model, plan: LayerPlan, layer: LayerNode, codes: NDArray[np.int8]) -> ir.Value:
        name = f"{layer.name}/weight_codes"
        if not self.packed or plan.weight_bits != 4:
            return constant(model, name, codes)
        packed = constant(model, name, codes.astype(ir.DataType.INT4.numpy()))
        node = named_node(layer, "Cast", [packed], "unpack_weight", {"to": int(ir.DataType.INT8)})
        node.outputs[0].type = ir.TensorType(ir.DataType.INT8)
        model.graph.insert_before(layer.node, node)
        return node.outputs[0]
