"""A skip concatenation's reader as one convolution per branch, each with scales of its own, and an add.

This is the form of Q-Diffusion (Li et al. 2023, arXiv 2302.04304, section 3.3): W x = W_0 x_0 + W_1 x_1 over the
columns of the branches. Network and graph are split the same way before anything is measured, so the parts are ordinary
layers to every later stage. What reads the concatenation through a normalization, which gives all channels one range,
stays whole, as it does there.
"""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, TypeVar

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common
from torch import Tensor, nn

from qdm_deploy.artifacts.topology import Layer
from qdm_deploy.errors import ExportError
from qdm_deploy.progress import SILENT, Progress
from qdm_export.metadata import MODULE_KEY
from qdm_export.passes.base import constant, graph_of, values_of
from qdm_export.topology import MIN_CHANNELS, LayerNode, layer_nodes, topology_of
from qdm_export.unet import Checkpoint, UNet

__all__ = ["ConcatReaders", "SplitConv2d", "concat_readers", "split_checkpoint", "split_graph", "split_network"]

_Module = TypeVar("_Module", bound=nn.Module)


@dataclass(frozen=True)
class ConcatReaders:
    """The INT8 candidates that read a skip concatenation without a normalization before them.

    Attributes:
        split: channels of each branch, in order, of the layers that can be split.
        whole: why each of the others cannot.
    """

    split: Mapping[str, tuple[int, ...]]
    whole: Mapping[str, str]


class SplitConv2d(nn.Module):
    """``convolution`` as a sum over slices of its input channels, each with an equal share of the bias.

    Shares, because OpenVINO 2026.4 scales the result of a quantized convolution without a bias twice where an Add and
    an output of the graph both read it, and then no check can look at it.
    """

    def __init__(self, convolution: nn.Conv2d, widths: Sequence[int]) -> None:
        """Split the weight [O, I, kh, kw] at ``widths``, whose sum is I; the slices share its memory.

        Raises:
            ExportError: it is grouped, or the widths are not its channels.
        """
        super().__init__()
        if convolution.groups != 1 or sum(widths) != convolution.in_channels:
            raise ExportError(
                f"a convolution of {convolution.in_channels} channels in {convolution.groups} groups cannot be split "
                f"at {tuple(widths)}; the widths must add up to its channels, in one group"
            )
        self.widths = tuple(widths)
        self.branches = nn.ModuleList()
        for start, end in _edges(widths):
            branch = _sharing_copy(convolution)
            branch.in_channels = end - start
            branch.weight = nn.Parameter(convolution.weight.detach()[:, start:end], requires_grad=False)
            if convolution.bias is not None:
                branch.bias = nn.Parameter(convolution.bias.detach() / len(widths), requires_grad=False)
            self.branches.append(branch)

    def forward(self, x: Tensor) -> Tensor:
        """[B, I, H, W] to what the whole convolution returns."""
        parts = x.split_with_sizes(self.widths, dim=1)
        result: Tensor = self.branches[0](parts[0])
        for branch, part in zip(list(self.branches)[1:], parts[1:], strict=True):
            result = result + branch(part)
        return result


def concat_readers(graph: ir.Model) -> ConcatReaders:
    """What of a float step graph can be split, and what cannot."""
    nodes = {item.name: item for item in layer_nodes(graph)}
    readers = [layer for layer in topology_of(graph).candidates if layer.reads_concat and not layer.normalized]
    reasons = {layer.name: _whole_reason(layer, nodes[layer.name]) for layer in readers}
    return ConcatReaders(
        split={layer.name: layer.branches for layer in readers if reasons[layer.name] is None},
        whole={name: reason for name, reason in reasons.items() if reason is not None},
    )


def split_checkpoint(
    checkpoint: Checkpoint, graph: ir.Model, progress: Progress = SILENT
) -> tuple[Checkpoint, ir.Model]:
    """A checkpoint and its float step graph with every layer split that can be; copies, unless nothing can be.

    Args:
        checkpoint: holds the network.
        graph: exported from it.
        progress: is told what stays whole.
    """
    readers = concat_readers(graph)
    for name, reason in readers.whole.items():
        progress.say(f"{name} is not split: {reason}")
    if not readers.split:
        progress.say("No layer reads a skip concatenation that can be split, so 'split' is the same as 'none' here")
        return checkpoint, graph
    unet = split_network(checkpoint.unet, readers.split)
    return dataclasses.replace(checkpoint, unet=unet), split_graph(graph, readers.split)


def split_network(network: UNet, widths: Mapping[str, tuple[int, ...]]) -> UNet:
    """A copy of ``network`` with a ``SplitConv2d`` for each layer in ``widths``; parameters are shared with it.

    Raises:
        ExportError: a layer is no convolution, or its widths do not fit.
    """
    twin = _sharing_copy(network)
    for name, branches in widths.items():
        parent, _, leaf = name.rpartition(".")
        module = twin.unet.get_submodule(name)
        if not isinstance(module, nn.Conv2d):
            raise ExportError(f"{name} is a {type(module).__name__}; only a Conv2d can be split by branches")
        setattr(twin.unet.get_submodule(parent), leaf, SplitConv2d(module, branches))
    return twin.eval()


def split_graph(graph: ir.Model, widths: Mapping[str, tuple[int, ...]]) -> ir.Model:
    """A copy of ``graph`` with Conv(Concat(a, b)) rewritten to Conv(a) + Conv(b) for each layer in ``widths``.

    The nodes name the modules that ``split_network`` makes. A Concat that nothing else reads goes.

    Raises:
        ExportError: a layer is not in the graph, or does not read a concatenation of these widths.
    """
    model = graph.clone()
    nodes = {item.name: item for item in layer_nodes(model)}
    for name, branches in widths.items():
        if name not in nodes:
            raise ExportError(f"{name} is to be split and is no layer of this graph")
        _split_node(model, nodes[name], branches)
    common.RemoveUnusedNodesPass()(model)
    return model


def _split_node(model: ir.Model, layer: LayerNode, widths: Sequence[int]) -> None:
    concat = layer.data.producer()
    if layer.kind != "conv" or concat is None or concat.op_type != "Concat" or len(concat.inputs) != len(widths):
        raise ExportError(f"{layer.name} does not read a concatenation of {len(widths)} branches")
    weight = values_of(layer.weight)
    if sum(widths) != weight.shape[1]:
        raise ExportError(
            f"{layer.name} reads {weight.shape[1]} channels and cannot be split at {tuple(widths)}; the widths must "
            "add up to its channels"
        )
    graph, whole = graph_of(layer.node), layer.output
    total: ir.Value | None = None
    for index, (branch, (start, end)) in enumerate(zip(concat.inputs, _edges(widths), strict=True)):
        name = f"{layer.name}.branches.{index}"
        inputs = [branch, constant(model, f"{name}.weight", weight[:, start:end])]
        if layer.bias is not None:
            inputs.append(constant(model, f"{name}.bias", values_of(layer.bias) / np.float32(len(widths))))
        path = f"{layer.node.metadata_props[MODULE_KEY]}.branches.{index}"
        part = _node("Conv", inputs, name, path, whole, tuple(layer.node.attributes.values()))
        graph.insert_before(layer.node, part)
        if total is None:
            total = part.outputs[0]
        else:
            label = f"{layer.name}/add_branch_{index}"
            add = _node("Add", [total, part.outputs[0]], label, layer.node.metadata_props[MODULE_KEY], whole)
            graph.insert_before(layer.node, add)
            total = add.outputs[0]
    if total is not None:
        whole.replace_all_uses_with(total)


def _node(
    op_type: str,
    inputs: Sequence[ir.Value | None],
    name: str,
    path: str,
    like: ir.Value,
    attributes: Sequence[ir.Attr] = (),
) -> ir.Node:
    output = ir.Value(name=name, shape=like.shape, type=like.type)
    return ir.Node("", op_type, inputs, attributes, outputs=[output], name=name, metadata_props={MODULE_KEY: path})


def _whole_reason(layer: Layer, item: LayerNode) -> str | None:
    producer = item.data.producer()
    if layer.kind != "conv":
        return "it is a matrix product; only convolutions are split"
    if producer is None or producer.op_type != "Concat":
        between = "nothing" if producer is None else producer.op_type
        return f"{between} stands between it and the concatenation"
    if min(layer.branches) < MIN_CHANNELS:
        return f"a branch of {min(layer.branches)} channels is too narrow for an INT8 layer of its own"
    return None


def _sharing_copy(module: _Module) -> _Module:
    memo: dict[int, Any] = {id(parameter): parameter for parameter in module.parameters()}
    return copy.deepcopy(module, memo)


def _edges(widths: Sequence[int]) -> list[tuple[int, int]]:
    return list(pairwise(accumulate(widths, initial=0)))
