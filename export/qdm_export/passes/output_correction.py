"""The correction of the network's output: three tables [T, C], looked up by timestep, applied in float32."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qdm_deploy.artifacts.plan import LayerPlan
from qdm_export.passes.base import PlanPass, constant, graph_of, whole_timestep
from qdm_export.topology import MODULE_KEY, LayerNode

__all__ = ["OutputCorrection"]


class OutputCorrection(PlanPass):
    """``(output - m - l x) / (1 + k)`` behind the network's last node, which only the sampler's update reads."""

    def rewrite(self, model: ir.Model, layers: Sequence[tuple[LayerPlan, LayerNode]]) -> bool:
        """Insert the lookups and the arithmetic; none is part of a module, so all stay float32."""
        if self.plan.output_correction is None:
            return False
        last = [node for node in model.graph if MODULE_KEY in node.metadata_props][-1]
        output = last.outputs[0]
        inputs = {value.name: value for value in model.graph.inputs}
        timestep = whole_timestep(model)
        readers = list(output.uses())
        added: list[ir.Node] = []

        def add(kind: str, operands: list[ir.Value], name: str, **attributes: int) -> ir.Value:
            node = ir.node(kind, operands, attributes, name=name)
            node.outputs[0].name, node.outputs[0].type = name, ir.TensorType(ir.DataType.FLOAT)
            node.outputs[0].shape = output.shape
            added.append(node)
            return node.outputs[0]

        def at_timestep(values: NDArray[Any], name: str) -> ir.Value:
            table = constant(model, f"{name}_table", values[:, :, None, None].astype(np.float32))
            row = add("Gather", [table, timestep], name, axis=0)
            row.shape = None
            return row

        shift, gain, share = self.plan.output_correction.swapaxes(0, 1)
        sample = inputs["sample"]
        if output.shape is not None and sample.shape is not None and output.shape[1] != sample.shape[1]:
            # A learned variance stands behind the predicted noise; the tables hold nothing for it.
            sample = add("Concat", [sample, sample], "sample_twice", axis=1)
        known = add("Mul", [sample, at_timestep(share / (1 + gain), "output_share")], "output_known")
        known = add("Add", [known, at_timestep(shift / (1 + gain), "output_shift")], "output_error")
        scaled = add("Mul", [output, at_timestep(1 / (1 + gain), "output_gain")], "output_scaled")
        corrected = add("Sub", [scaled, known], "corrected_output")
        graph_of(last).insert_after(last, added)
        for reader in readers:
            reader.node.replace_input_with(reader.idx, corrected)
        return True
