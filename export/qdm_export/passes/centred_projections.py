"""Projections of the time embedding that are centred in each group of the norm behind them.

A projection that is only added in front of a group norm is centred in each group, by its weights: the norm takes the
mean of a group away again, so nothing changes, and the norm need not ask for it. All is computed in float64. The value
says that it is centred (``metadata.CENTRED_KEY``).
"""

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qdm_export.metadata import CENTRED_KEY
from qdm_export.passes.base import LeftAlone, NodePass, NoMatch, constant
from qdm_export.passes.projections import RESHAPES, operands, projections
from qdm_export.topology import weight_is_transposed

__all__ = ["CentredProjections"]


class CentredProjections(NodePass):
    """Centres what residual blocks make of the time embedding."""

    name = "centred projections"

    def places(self, model: ir.Model) -> list[ir.Node]:
        """Every projection of the time embedding."""
        return projections(model)

    def at(self, model: ir.Model, node: ir.Node) -> None:
        """Take the mean of each group out of weight and bias."""
        output = node.outputs[0]
        factors = operands(node)
        groups = _groups_behind(output)
        weight, bias = (_without_group_means(values, groups) for values in factors)
        stored = weight.T if weight_is_transposed(node) else weight
        for index, values in ((1, stored), (2, bias)):
            name = f"{node.inputs[index].name}/centred"  # type: ignore[union-attr]  # ``operands`` found it
            node.replace_input_with(index, constant(model, name, values.astype(np.float32)))
        output.metadata_props[CENTRED_KEY] = str(groups)


def _groups_behind(value: ir.Value) -> int:
    """The groups of the one norm that reads a sum with ``value``, where nothing else reads either."""
    channels = None if value.shape is None else value.shape[1]
    while True:
        readers = list(value.uses())
        if len(readers) != 1 or value.is_graph_output():
            raise NoMatch(f"{len(readers)} nodes read {value.name} on the way to a norm, and not one")
        node = readers[0].node
        if node.op_type == "GroupNormalization":
            return int(node.attributes["num_groups"].as_int())
        if node.op_type == "Split":
            raise LeftAlone("it scales a norm as well as shifting it")
        if node.op_type not in (*RESHAPES, "Add"):
            raise NoMatch(f"{node.op_type} {node.name} stands between it and a norm")
        if node.op_type == "Add" and (value.shape is None or len(value.shape) < 2 or value.shape[1] != channels):
            raise NoMatch(f"Add {node.name} does not add it to channels")
        value = node.outputs[0]


def _without_group_means(values: NDArray[np.float64], groups: int) -> NDArray[np.float64]:
    """[C, ...] less the mean over the channels of each group."""
    each = values.reshape(groups, -1, *values.shape[1:])
    centred: NDArray[np.float64] = each - each.mean(axis=1, keepdims=True)
    return centred.reshape(values.shape)
