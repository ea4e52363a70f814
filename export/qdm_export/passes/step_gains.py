"""Step-aware gains: x / r before the layer, y * r behind it, r gathered per sample from the timestep.

The quantize scale stays a constant, which is what every engine's INT8 fusion needs, and each sample of a batch has the
gain of its own timestep. Multiplying by r behind the kernel means its bias comes after that, so the kernel itself has
none.
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
    insert_before,
    layer_groups,
    require_float_inputs,
    values_of,
    whole_timestep,
)
from qdm_export.topology import LayerNode

__all__ = ["StepGains"]


class StepGains(PlanPass):
    """Rewrites conv(x) + b to conv(x * (1/r)) * r + b; in exact arithmetic the function stays the same."""

    name = "step gains"

    def requires(self, model: ir.Model) -> None:
        """Nothing is quantized yet."""
        require_float_inputs(model, self.plan)

    def concerns(self, plan: LayerPlan) -> bool:
        """Whether its input has gains."""
        return plan.inverse_r is not None

    def apply(self, model: ir.Model, layers: Sequence[tuple[LayerPlan, LayerNode]]) -> Iterable[str]:
        """Insert the gathers and the multiplies of every input with gains."""
        groups = [(group, factors) for group in layer_groups(layers) if (factors := group[0][0].inverse_r) is not None]
        if not groups:
            return
        row_bin = self._row_bin(model)
        for group, inverse_r in groups:
            first = group[0][1]
            inverse = self._gathered(model, first, inverse_r, row_bin, "inverse_r")
            gain = self._gathered(model, first, np.float32(1) / inverse_r, row_bin, "r")
            scaled = insert_before(first, "Mul", [inverse], "scale_step").outputs[0]
            for _, layer in group:
                layer.node.replace_input_with(0, scaled)
                if layer.node.op_type != "MatMul" and layer.bias is not None:
                    layer.node.replace_input_with(2, None)
                    bias = values_of(layer.bias).reshape((1, -1, 1, 1) if layer.kind == "conv" else (-1,))
                    insert_after(layer, "Add", [constant(model, f"{layer.name}/bias", bias)], "add_bias")
                insert_after(layer, "Mul", [gain], "unscale_step")
                yield layer.name

    def _row_bin(self, model: ir.Model) -> ir.Value:
        """Gain bin of each row, [B] int64: one lookup by timestep for the whole graph."""
        timestep = whole_timestep(model)
        table = constant(model, "bin_of_timestep", self.plan.bin_of_timestep())
        output = ir.Value(name="step_bin", shape=timestep.shape, type=ir.TensorType(ir.DataType.INT64))
        node = ir.node("Gather", [table, timestep], {"axis": 0}, outputs=[output], name="step_bin")
        producer = timestep.producer()
        if producer is None:
            model.graph.insert_before(model.graph[0], node)
        else:
            model.graph.insert_after(producer, node)
        return output

    def _gathered(
        self, model: ir.Model, layer: LayerNode, table: NDArray[np.float32], row_bin: ir.Value, label: str
    ) -> ir.Value:
        # Tables shaped [K, 1, 1, 1] gather straight to [B, 1, 1, 1]; slicing one [B, layers] tensor cost engine builds
        # a multiple of the time for the same kernels.
        if layer.data.shape is None:
            raise ExportError(f"the input of {layer.name} has no known rank, which its step-aware gains must follow")
        ones = (1,) * (len(layer.data.shape) - 1)
        values = constant(model, f"{layer.name}/{label}_table", table.astype(np.float32).reshape(-1, *ones))
        node = insert_before(layer, "Gather", [], label, axis=0)
        node.replace_input_with(0, values)
        node.resize_inputs(2)
        node.replace_input_with(1, row_bin)
        node.outputs[0].shape = ir.Shape([row_bin.shape[0] if row_bin.shape else None, *ones])
        return node.outputs[0]
