"""Weight codes as initializers behind a DequantizeLinear, per output channel.

Codes of 4 bits are stored as INT4, two to a byte, behind a Cast to INT8 where a runtime folds that Cast when it loads
the graph: the codes take half the space on disk, and the kernels get the INT8 weights that they know.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qdm_deploy.artifacts.plan import LayerPlan, QuantizationPlan
from qdm_deploy.errors import ExportError
from qdm_export.passes.base import PlanPass, constant
from qdm_export.topology import LayerNode, weight_is_transposed

__all__ = ["QuantizeWeights"]


class QuantizeWeights(PlanPass):
    """Replaces each float weight by the plan's codes, in the layout the node reads."""

    def __init__(self, plan: QuantizationPlan, *, packed: bool = False) -> None:
        """Store codes of 4 bits as INT4 (``packed``), or as INT8 like all others."""
        super().__init__(plan)
        self.packed = packed

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
            codes = self._codes(model, plan, layer, plan.codes.T if transposed else plan.codes)
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

    def _codes(self, model: ir.Model, plan: LayerPlan, layer: LayerNode, codes: NDArray[np.int8]) -> ir.Value:
        name = f"{layer.name}/weight_codes"
        if not self.packed or plan.weight_bits != 4:
            return constant(model, name, codes)
        packed = constant(model, name, codes.astype(ir.DataType.INT4.numpy()))
        output = ir.Value(name=f"{name}/int8", shape=packed.shape, type=ir.TensorType(ir.DataType.INT8))
        node = ir.node(
            "Cast",
            [packed],
            {"to": int(ir.DataType.INT8)},
            outputs=[output],
            name=f"{layer.name}/unpack_weight",
            metadata_props=dict(layer.node.metadata_props),
        )
        model.graph.insert_before(layer.node, node)
        return output
