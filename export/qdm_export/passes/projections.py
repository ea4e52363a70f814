"""What residual blocks make of the time embedding: each projects it to its channels, for itself."""

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qdm_export.passes.base import NoMatch, values_of
from qdm_export.topology import layer_nodes, reached_from, weight_is_transposed

__all__ = ["RESHAPES", "behind_reshapes", "inputs_behind", "operands", "projections"]

# Operators that only show a value in another shape.
RESHAPES = ("Unsqueeze", "Reshape")


def projections(model: ir.Model) -> list[ir.Node]:
    """The layers that depend on the timestep and not on the sample, and lead to no other such layer."""
    inputs = {value.name: value for value in model.graph.inputs}
    if "timestep" not in inputs or "sample" not in inputs:
        return []
    on_time = reached_from(model, [inputs["timestep"]])
    on_sample = reached_from(model, [inputs["sample"]])
    found = [item for item in layer_nodes(model) if item.data in on_time and item.data not in on_sample]
    return [item.node for item in found if not _leads_to(item.output, {other.node for other in found}, on_sample)]


def _leads_to(value: ir.Value, nodes: set[ir.Node], stop: set[ir.Value]) -> bool:
    queue, seen = [value], {value}
    while queue:
        for use in queue.pop().uses():
            if use.node in nodes:
                return True
            new = [output for output in use.node.outputs if output not in seen and output not in stop]
            seen.update(new)
            queue += new
    return False


def operands(node: ir.Node) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Weight [C, D] and bias [C] of a projection.

    Raises:
        NoMatch: it is no Gemm of constants.
    """
    plain = all(name not in node.attributes or node.attributes[name].as_float() == 1.0 for name in ("alpha", "beta"))
    constants = [value for value in node.inputs[1:] if value is not None and value.const_value is not None]
    if node.op_type != "Gemm" or len(constants) != 2 or not plain:
        raise NoMatch(f"it is a {node.op_type} of {len(constants)} constants, and not a Gemm of weight and bias")
    weight, bias = (values_of(value).astype(np.float64) for value in constants)
    return (weight.T if weight_is_transposed(node) else weight), bias


def behind_reshapes(value: ir.Value) -> ir.Value:
    """The value that this one only shows in another shape."""
    producer = value.producer()
    while producer is not None and producer.op_type in RESHAPES and producer.inputs[0] is not None:
        value = producer.inputs[0]
        producer = value.producer()
    return value


def inputs_behind(value: ir.Value, inputs: Iterable[ir.Value]) -> set[str]:
    """Names of the graph's inputs that a value depends on; a tensor's shape says nothing of its values."""
    wanted = set(inputs)
    found: set[str] = set()
    seen, queue = {value}, [value]
    while queue:
        each = queue.pop()
        if each in wanted:
            found.add(str(each.name))
        node = each.producer()
        if node is not None and node.op_type != "Shape":
            new = [operand for operand in node.inputs if operand is not None and operand not in seen]
            seen.update(new)
            queue += new
    return found
