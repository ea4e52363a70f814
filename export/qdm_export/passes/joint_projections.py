"""Projections of one vector in one matrix product, for OpenVINO's CPU plugin.

Every residual block projects the time embedding to its own channels. Each product is so small that many cores spend
more time on beginning and ending it than on multiplying: together they are one product and a split. The weights are
joined by a Concat of constants, which the plugin folds as it loads the graph, so that the bundle holds them once.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qdm_export.passes.base import constant, graph_of, values_of

__all__ = ["JointProjections"]


class JointProjections(ir.passes.InPlacePass):
    """Joins two or more float Gemms that read the same value, each with constant weight [C, D] and bias [C]."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place."""
        found: dict[ir.Value, list[ir.Node]] = {}
        for node in model.graph:
            if _fits(node) and node.inputs[0] is not None:
                found.setdefault(node.inputs[0], []).append(node)
        groups = [nodes for nodes in found.values() if len(nodes) > 1]
        for nodes in groups:
            _join(model, nodes)
        return ir.passes.PassResult(model, modified=bool(groups))


def _fits(node: ir.Node) -> bool:
    if node.op_type != "Gemm" or len(node.inputs) != 3:
        return False
    constants = all(value is not None and value.is_initializer() for value in node.inputs[1:])
    plain = all(node.attributes[name].as_float() == 1 for name in ("alpha", "beta") if name in node.attributes)
    turned = {name: node.attributes[name].as_int() for name in ("transA", "transB") if name in node.attributes}
    return constants and plain and turned.get("transA", 0) == 0 and turned.get("transB", 0) == 1


def _join(model: ir.Model, nodes: Sequence[ir.Node]) -> None:
    first, (data, *_) = nodes[0], nodes[0].inputs
    sizes = [len(values_of(node.inputs[1])) for node in nodes]  # type: ignore[arg-type]  # `_fits` saw that it is one
    rows = None if data is None or data.shape is None else data.shape[0]

    def made(op_type: str, inputs: Sequence[ir.Value | None], label: str, outputs: Sequence[ir.Value] | None = None,
             **attributes: int) -> ir.Value:  # fmt: skip
        name = f"{first.name}/{label}"
        outputs = outputs or [ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT))]
        node = ir.node(
            op_type, inputs, attributes, outputs=outputs, name=name, metadata_props=dict(first.metadata_props)
        )
        graph_of(first).insert_before(first, node)
        return outputs[0]

    weight = made("Concat", [node.inputs[1] for node in nodes], "joint_weight", axis=0)
    bias = made("Concat", [node.inputs[2] for node in nodes], "joint_bias", axis=0)
    product = made("Gemm", [data, weight, bias], "joint", transB=1)
    product.shape = ir.Shape([rows, sum(sizes)])
    parts = [ir.Value(name=f"{node.name}/part", type=ir.TensorType(ir.DataType.FLOAT)) for node in nodes]
    made("Split", [product, constant(model, f"{first.name}/sizes", np.array(sizes))], "parts", parts, axis=1)
    for node, part in zip(nodes, parts, strict=True):
        part.shape = node.outputs[0].shape
        node.outputs[0].replace_all_uses_with(part)
        graph_of(node).remove(node, safe=True)
