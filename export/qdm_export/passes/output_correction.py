"""The correction of the network's output: a table [T, C] that is looked up by timestep and subtracted in float32."""

from collections.abc import Sequence

import onnx_ir as ir

from qdm_deploy.artifacts.plan import LayerPlan
from qdm_deploy.errors import ExportError
from qdm_export.passes.base import PlanPass, constant, graph_of
from qdm_export.topology import MODULE_KEY, LayerNode

__all__ = ["OutputCorrection"]


class OutputCorrection(PlanPass):
    """Subtracts behind the network's last node, which only the sampler's update reads."""

    def rewrite(self, model: ir.Model, layers: Sequence[tuple[LayerPlan, LayerNode]]) -> bool:
        """Insert the lookup and the subtraction; neither is part of a module, so both stay float32."""
        if self.plan.output_correction is None:
            return False
        last = [node for node in model.graph if MODULE_KEY in node.metadata_props][-1]
        output = last.outputs[0]
        timestep = next((value for value in model.graph.inputs if value.name == "timestep"), None)
        if timestep is None:
            raise ExportError("the graph has no timestep input to look the correction of the output up by")
        readers = list(output.uses())
        table = constant(model, "output_correction_table", self.plan.output_correction[:, :, None, None])
        lookup = ir.node("Gather", [table, timestep], {"axis": 0}, name="output_correction")
        corrected = ir.node("Sub", [output, lookup.outputs[0]], name="corrected_output")
        for node in (lookup, corrected):
            node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
            node.outputs[0].name = node.name
        corrected.outputs[0].shape = output.shape
        graph_of(last).insert_after(last, [lookup, corrected])
        for reader in readers:
            reader.node.replace_input_with(reader.idx, corrected.outputs[0])
        return True
