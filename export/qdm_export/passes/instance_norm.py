"""GroupNormalization as Reshape, InstanceNormalization, Reshape, scale and shift, for ONNX Runtime's CPU provider.

It has no kernel for GroupNormalization and expands it into a dozen small nodes, shape arithmetic among them; it does
have one for InstanceNormalization, which is the same sum once a group's channels lie side by side.
"""

import math

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

__all__ = ["InstanceNormForm"]


class InstanceNormForm(ir.passes.InPlacePass):
    """Rewrites every GroupNormalization with constant scale and bias and a static shape behind the batch."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place."""
        modified = False
        for node in list(model.graph):
            if node.op_type == "GroupNormalization":
                modified |= _rewrite(model.graph, node)
        return ir.passes.PassResult(model, modified=modified)


def _rewrite(graph: ir.Graph, node: ir.Node) -> bool:
    data, scale, bias = node.inputs
    if data is None or scale is None or bias is None or data.shape is None:
        return False
    sizes = list(data.shape)[1:]
    if scale.const_value is None or bias.const_value is None or not all(isinstance(size, int) for size in sizes):
        return False
    static = [int(size) for size in sizes if isinstance(size, int)]
    groups = node.attributes["num_groups"].as_int()
    width = math.prod(static) // groups
    per_channel = (1, -1, *([1] * (len(static) - 1)))
    grouped = _add(
        graph, node, "Reshape", [data, _constant(graph, f"group_{groups}", np.array([0, groups, -1]))], "group"
    )
    ones = _constant(graph, f"ones_{groups}", np.ones(groups, dtype=np.float32))
    zeros = _constant(graph, f"zeros_{groups}", np.zeros(groups, dtype=np.float32))
    epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
    normal = _add(graph, node, "InstanceNormalization", [grouped, ones, zeros], "normalize", epsilon=epsilon)
    back = _constant(graph, "shape_" + "x".join(map(str, static)), np.array([0, *static]))
    apart = _add(graph, node, "Reshape", [normal, back], "ungroup")
    gamma = _constant(graph, f"{scale.name}/{len(static)}d", scale.const_value.numpy().reshape(per_channel))
    beta = _constant(graph, f"{bias.name}/{len(static)}d", bias.const_value.numpy().reshape(per_channel))
    scaled = _add(graph, node, "Mul", [apart, gamma], "gamma")
    result = _add(graph, node, "Add", [scaled, beta], "beta")
    for value in (grouped, normal):
        value.shape = ir.Shape([data.shape[0], groups, width])
    for value in (apart, scaled, result):
        value.shape = data.shape
    node.outputs[0].replace_all_uses_with(result)
    graph.remove(node, safe=True)
    return True


def _add(
    graph: ir.Graph, node: ir.Node, op_type: str, inputs: list[ir.Value], label: str, **attributes: float
) -> ir.Value:
    name = f"{node.name}/{label}"
    output = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT))
    new = ir.node(op_type, inputs, attributes, outputs=[output], name=name, metadata_props=dict(node.metadata_props))
    graph.insert_before(node, new)
    return output


def _constant(graph: ir.Graph, name: str, values: NDArray[np.generic]) -> ir.Value:
    if name not in graph.initializers:
        tensor = ir.tensor(values, name=name)
        value = ir.Value(name=name, shape=ir.Shape(values.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        graph.register_initializer(value)
    return graph.initializers[name]
