"""The correction of the network's output: three tables [T, C], looked up by timestep, applied in float32."""

from typing import Any, Self

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qdm_deploy.artifacts.plan import QuantizationPlan
from qdm_export.metadata import MODULE_KEY
from qdm_export.passes.base import GraphPass, Settings, constant, graph_of, whole_timestep
from qdm_export.rewrites import Found, Place

__all__ = ["OutputCorrection"]

_OUTPUT = Place("the network's output")


class OutputCorrection(GraphPass):
    """``(output - m - l x) / (1 + k)`` behind the network's last node, which only the sampler's update reads."""

    name = "output correction"

    def __init__(self, plan: QuantizationPlan) -> None:
        """With the tables of ``plan``."""
        super().__init__()
        self.plan = plan

    @classmethod
    def made(cls, settings: Settings) -> Self:
        """With the plan of the settings."""
        return cls(settings.plan)

    def promised(self, model: ir.Model) -> list[Place]:
        """One, where the plan has a correction."""
        return [] if self.plan.output_correction is None else [_OUTPUT]

    def rewrite(self, model: ir.Model) -> Found:
        """Insert the lookups and the arithmetic; none is part of a module, so all stay float32."""
        if self.plan.output_correction is None:
            return Found()
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
        return Found(done=[_OUTPUT.name])
