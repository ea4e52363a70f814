"""Factors k per input channel that cost nothing: 1 / k multiplied into constants before the input, k into its readers.

x / k before a layer is an operation of its own, unless what makes x can make x / k instead (``linear_path``): the
normalization before q, k and v takes it into its scale and bias; v takes the factor of the projection behind the
attention into its output channels; an upsampling convolution's goes into the two convolutions of the residual sum
before it (SmoothQuant folds into the layer norm before, arXiv 2211.10438, section 4; here the graph says where it can).
The weight codes of a layer that takes a factor stay as planned: only its weight scale and bias are multiplied.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qdm_deploy.artifacts.plan import LayerPlan, QuantizationPlan
from qdm_export.linear_path import Factor, LinearPath, linear_path
from qdm_export.passes.base import constant, layer_groups, values_of
from qdm_export.rewrites import Found, Place, Rewrite
from qdm_export.topology import LayerNode, layer_nodes, weight_is_transposed

__all__ = ["Absorption", "absorb_factors"]


@dataclass(frozen=True)
class Absorption:
    """What was absorbed.

    Attributes:
        inputs: layers that now read x / k, with the 1 / k, [C] float32.
        outputs: layers that now return y * f, with the f of each output channel, [O] float32.
        rewrites: the count; what the plan's layers say of their absorber is the promise.
    """

    inputs: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    outputs: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    rewrites: tuple[Rewrite, ...] = ()

    def plan(self, plan: QuantizationPlan) -> QuantizationPlan:
        """The plan of the rewritten graph: the same codes, no k where it is absorbed, weight scales multiplied."""
        return replace(plan, layers=tuple(self._layer(item) for item in plan.layers))

    def _layer(self, plan: LayerPlan) -> LayerPlan:
        if plan.precision != "int8":
            return plan
        if plan.name in self.inputs:
            plan = replace(plan, inverse_k=None)
        if plan.name in self.outputs:
            plan = replace(plan, weight_scale=plan.weight_scales * self.outputs[plan.name])
        return plan


def absorb_factors(model: ir.Model, plan: QuantizationPlan, *, unsigned: bool, quantized_outputs: bool) -> Absorption:
    """Rewrite a float step graph, in place, so that factors of ``plan`` cost no operation where that can be.

    The graph computes what it did before, to float32 rounding. A factor stays as planned (``passes/channel_factors``)
    where nothing linear leads to constants, where something else reads the unscaled tensor, where a weight scale would
    no longer be exact in float16, or where the producer's output is quantized to a grid of its own.

    Args:
        model: the float step graph.
        plan: with the factors.
        unsigned: the target has u8 codes, whose quantize takes a convolution's k by itself.
        quantized_outputs: the target quantizes outputs of INT8 convolutions.
    """
    nodes = {item.name: item for item in layer_nodes(model)}
    owners = {item.node: item for item in nodes.values()}
    planned = {item.name: item for item in plan.layers}
    inputs: dict[str, NDArray[np.float32]] = {}
    outputs: dict[str, NDArray[np.float32]] = {}
    found, promised = Found(), []
    for group in layer_groups([(item, nodes[item.name]) for item in plan.quantized if item.name in nodes]):
        first_plan, first = group[0]
        inverse_k = first_plan.inverse_k
        if inverse_k is None or (unsigned and first_plan.axis_scale is not None):
            continue
        names = [item.name for item, _ in group]
        promised += [Place(item.name) for item, _ in group if item.layer.absorber is not None]
        readers = _readers(first.data, owners)
        if readers is None or not all(_same(item.inverse_k, inverse_k) for item, _ in group):
            found.left |= dict.fromkeys(names, "something else reads the tensor without factors")
            continue
        path = linear_path(first.data, _on_channels(first, inverse_k.astype(np.float64)))
        if path is None:
            found.missed |= dict.fromkeys(names, "nothing linear leads from constants to its input")
            continue
        if not _exact(path, owners, planned, quantized_outputs=quantized_outputs):
            reason = "a weight scale would not be exact in float16, or the tensor has codes of its own"
            found.left |= dict.fromkeys(names, reason)
            continue
        found.done += names
        _multiply(model, path, first.name)
        for reader in readers:
            _divide_columns(model, reader, inverse_k)
            inputs[reader.name] = inverse_k
        outputs |= {owners[node].name: factor.astype(np.float32) for node, factor in path.layers.items()}
    rewrite = Rewrite.of("absorbed factors", promised, found)
    return Absorption(inputs, outputs, (rewrite,) if promised or found.left else ())


def _readers(value: ir.Value, owners: Mapping[ir.Node, LayerNode]) -> list[LayerNode] | None:
    """The layers that read this tensor; None if something else does too."""
    if value.is_graph_output():
        return None
    readers = []
    for use in value.uses():
        layer = owners.get(use.node)
        if layer is None or use.idx != 0:
            return None
        readers.append(layer)
    return readers


def _same(one: NDArray[np.float32] | None, other: NDArray[np.float32]) -> bool:
    return one is not None and np.array_equal(one, other)


def _on_channels(layer: LayerNode, values: Factor) -> Factor:
    """The factor in the rank of the layer's input."""
    rank = 4 if layer.data.shape is None else len(layer.data.shape)
    return values.reshape((1, -1) + (1,) * (rank - 2) if layer.kind == "conv" else (1,) * (rank - 1) + (-1,))


def _exact(
    path: LinearPath,
    owners: Mapping[ir.Node, LayerNode],
    planned: Mapping[str, LayerPlan],
    *,
    quantized_outputs: bool,
) -> bool:
    for node, factor in path.layers.items():
        if node not in owners:
            return False
        plan = planned.get(owners[node].name)
        if plan is None or plan.precision != "int8":
            continue
        if quantized_outputs and plan.output_scale is not None:
            return False
        scale = plan.weight_scales * factor
        with np.errstate(over="ignore"):
            if not np.array_equal(scale.astype(np.float16).astype(np.float64), scale):
                return False
    return True


def _multiply(model: ir.Model, path: LinearPath, name: str) -> None:
    for number, site in enumerate(path.sites):
        _replace(model, site.node, site.index, site.factor, f"{name}/absorbed_{number}")


def _divide_columns(model: ir.Model, layer: LayerNode, inverse_k: NDArray[np.float32]) -> None:
    """W * k, in float64 and rounded once; an INT8 layer's codes are of W * k already and replace this."""
    k = 1 / inverse_k.astype(np.float64)
    columns = (-1, 1) if weight_is_transposed(layer.node) else (1, -1, *([1] * (len(layer.weight.shape or ()) - 2)))
    _replace(model, layer.node, 1, k.reshape(columns), f"{layer.name}/weight_times_k")


def _replace(model: ir.Model, node: ir.Node, index: int, factor: Factor, name: str) -> None:
    """A constant of its own for this node: the old one may serve others too."""
    value = node.inputs[index]
    if value is None:
        return
    product = (values_of(value).astype(np.float64) * factor).astype(np.float32)
    node.replace_input_with(index, constant(model, name, product))
