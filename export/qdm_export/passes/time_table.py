"""The time embedding as a float32 table with one row per timestep.

There are only T timesteps, so what depends on nothing else is computed once, in float32, and looked up. It removes a
few small matrix products per step, and it keeps the timestep exact on backends that compute in bfloat16, where 992 to
995 would round to one value before the sinusoids see them.
"""

import numpy as np
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray
from onnx_ir.passes import common

from qdm_deploy.errors import ExportError
from qdm_export.metadata import TIME_TABLE_KEY
from qdm_export.passes.base import GraphPass
from qdm_export.rewrites import Found

__all__ = ["TimeTable"]


class TimeTable(GraphPass):
    """Replaces the last value that carries all of the timestep's influence by a lookup in a table [T, D]."""

    name = "time table"

    def __init__(self, num_train_timesteps: int) -> None:
        """The table has ``num_train_timesteps`` rows."""
        super().__init__()
        self.num_train_timesteps = num_train_timesteps

    def rewrite(self, model: ir.Model) -> Found:
        """Compute the table and put the lookup in place of what made it."""
        timestep = next((value for value in model.graph.inputs if value.name == "timestep"), None)
        if timestep is None:
            raise ExportError("the graph has no timestep input to make a table of")
        embedding = _bottleneck(model, timestep)
        if embedding is None:
            return Found()
        values = self._evaluate(model, embedding)
        tensor = ir.tensor(values, name="time_table")
        table = ir.Value(
            name="time_table", shape=ir.Shape(values.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        model.graph.register_initializer(table)
        output = ir.Value(name="time_embedding", shape=embedding.shape, type=ir.TensorType(ir.DataType.FLOAT))
        mark = {TIME_TABLE_KEY: str(self.num_train_timesteps)}
        lookup = ir.node(
            "Gather", [table, timestep], {"axis": 0}, outputs=[output], name="time_embedding", metadata_props=mark
        )
        model.graph.insert_before(model.graph[0], lookup)
        embedding.replace_all_uses_with(output)
        common.RemoveUnusedNodesPass()(model)
        return Found(done=[str(lookup.name)])

    def _evaluate(self, model: ir.Model, embedding: ir.Value) -> NDArray[np.float32]:
        part = model.clone()
        name = embedding.name
        value = next(value for node in part.graph for value in node.outputs if value.name == name)
        part.graph.outputs.clear()
        part.graph.outputs.append(value)
        common.RemoveUnusedNodesPass()(part)
        session = onnxruntime.InferenceSession(
            ir.to_proto(part).SerializeToString(), providers=["CPUExecutionProvider"]
        )
        feeds: dict[str, NDArray[np.generic]] = {}
        for item in session.get_inputs():
            # Only the timestep matters; another input can appear for its batch size alone.
            shape = [self.num_train_timesteps, *(size for size in item.shape[1:])]
            feeds[item.name] = np.zeros(shape, dtype=np.int64 if "int64" in item.type else np.float32)
        feeds["timestep"] = np.arange(self.num_train_timesteps, dtype=np.int64)
        used = {item.name for item in session.get_inputs()}
        (table,) = session.run(None, {key: array for key, array in feeds.items() if key in used})
        if table.ndim != 2 or len(table) != self.num_train_timesteps or not np.isfinite(table).all():
            raise ExportError(
                f"the time embedding {name!r} gave a table of shape {table.shape}, or one that is not finite"
            )
        return np.asarray(table, dtype=np.float32)


def _bottleneck(model: ir.Model, timestep: ir.Value) -> ir.Value | None:
    """The last [B, D] float value that depends on the timestep alone and that all of its influence passes through."""
    others = {value for value in model.graph.inputs if value is not timestep}
    on_time: dict[ir.Value, ir.Node] = {}
    for node in model.graph:
        if node.op_type == "Shape":  # a tensor's shape says nothing of its values
            continue
        if any(value in others for value in node.inputs):
            others.update(node.outputs)
        elif any(value is timestep or value in on_time for value in node.inputs):
            on_time.update(dict.fromkeys(node.outputs, node))
    for candidate in reversed(list(on_time)):
        is_table = candidate.shape is not None and len(candidate.shape) == 2 and candidate.dtype == ir.DataType.FLOAT
        if is_table and not _escapes(timestep, candidate, on_time):
            return candidate
    return None


def _escapes(timestep: ir.Value, gate: ir.Value, on_time: dict[ir.Value, ir.Node]) -> bool:
    """Whether the timestep reaches a node outside the timestep-only part without passing ``gate``."""
    reached, queue = {timestep}, [timestep]
    while queue:
        value = queue.pop()
        for use in value.uses():
            inside = [output for output in use.node.outputs if output in on_time]
            if not inside and use.node.op_type != "Shape":
                return True
            for output in inside:
                if output is not gate and output not in reached:
                    reached.add(output)
                    queue.append(output)
    return False
