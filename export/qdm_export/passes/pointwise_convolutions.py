"""INT8 products over the positions of an image as convolutions of one position, for OpenVINO's CPU plugin.

A linear layer of attention multiplies every row of [B, H W, I] by one matrix, as a 1x1 convolution does every position
of [B, I, H, W]; in the plugin's layout, channels last, both lie in memory alike. Its kernel for the convolution is the
faster one, and a quantize becomes part of what is in front of it, such as the norm's scale and shift.

No number changes, and nothing moves: the plugin sees that the transposes undo its layout, where the image they speak of
has a height and a width. The codes stay as the other targets read them, [I, O], and are turned when the graph is
loaded.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from qdm_deploy.artifacts.plan import LayerPlan
from qdm_deploy.errors import ExportError
from qdm_export.passes.attention import producer
from qdm_export.passes.base import PlanPass, constant, graph_of, named_node
from qdm_export.topology import LayerNode, layer_nodes

__all__ = ["PointwiseConvolutions"]


class PointwiseConvolutions(PlanPass):
    """Runs behind the passes that quantize, which know linear layers."""

    def rewrite(self, model: ir.Model, layers: Sequence[tuple[LayerPlan, LayerNode]]) -> bool:
        """Replace every INT8 MatMul of as many rows as an image of this graph has positions."""
        images = _images(model)
        found = [(layer, image) for _, layer in layers if (image := images.get(_rows(layer))) is not None]
        for layer, image in found:
            _replace(model, layer, image)
        return bool(found)


def _images(model: ir.Model) -> dict[int, tuple[int, int]]:
    """Height and width by the number of positions, of what the graph's convolutions read."""
    images = {}
    for layer in layer_nodes(model):
        if layer.kind == "conv" and layer.data.shape is not None:
            _, _, *sizes = layer.data.shape
            height, width = (size if isinstance(size, int) else 1 for size in sizes)
            if min(height, width) > 1:  # otherwise the plugin takes the transposes for something else, and runs them
                images[height * width] = (height, width)
    return images


def _rows(layer: LayerNode) -> int:
    """S of a MatMul of [B, S, I]; 0 for any other layer."""
    shape = layer.data.shape
    if layer.node.op_type != "MatMul" or shape is None or len(shape) != 3 or not isinstance(shape[1], int):
        return 0
    return shape[1]


def _replace(model: ir.Model, layer: LayerNode, image: tuple[int, int]) -> None:
    graph, node, (height, width) = graph_of(layer.node), layer.node, image
    dequantize = _made_by(node, 0, "DequantizeLinear")
    quantize = _made_by(dequantize, 0, "QuantizeLinear")
    weight = _convolution_weight(model, layer, _made_by(node, 1, "DequantizeLinear"))
    width_out, width_in, *_ = _sizes(weight)
    batch = None if layer.data.shape is None else layer.data.shape[0]

    def add(before: ir.Node, op_type: str, inputs: list[ir.Value], label: str, *sizes: Any, **how: Any) -> ir.Value:
        made = named_node(layer, op_type, inputs, label, how)
        made.outputs[0].shape = ir.Shape([batch, *sizes])
        graph.insert_before(before, made)
        return made.outputs[0]

    as_image = constant(model, f"image_{height}x{width}x{width_in}", np.array([0, height, width, width_in]))
    positions = add(quantize, "Reshape", [_input(quantize, 0), as_image], "image", height, width, width_in)
    first = add(quantize, "Transpose", [positions], "channels_first", width_in, height, width, perm=(0, 3, 1, 2))
    quantize.replace_input_with(0, first)
    quantize.outputs[0].shape = dequantize.outputs[0].shape = first.shape

    operands = [dequantize.outputs[0], weight, *([] if layer.bias is None else [layer.bias])]
    product = add(node, "Conv", operands, "convolution", width_out, height, width, kernel_shape=(1, 1))
    product.producer().name = layer.name  # type: ignore[union-attr]  # which profiles and checks know it by
    as_rows = constant(model, f"rows_{height * width}x{width_out}", np.array([0, height * width, width_out]))
    last = add(node, "Transpose", [product], "channels_last", height, width, width_out, perm=(0, 2, 3, 1))
    layer.output.replace_all_uses_with(add(node, "Reshape", [last, as_rows], "rows", height * width, width_out))
    graph.remove([node, *([] if layer.bias_add is None else [layer.bias_add])], safe=True)


def _convolution_weight(model: ir.Model, layer: LayerNode, dequantize: ir.Node) -> ir.Value:
    """[O, I, 1, 1] of codes that are stored as [I, O]."""
    codes = _input(dequantize, 0)
    width_in, width_out = _sizes(codes)
    turned = named_node(layer, "Transpose", [codes], "turned_weight", {"perm": (1, 0)})
    shape = constant(model, f"kernel_{width_out}x{width_in}", np.array([width_out, width_in, 1, 1]))
    kernel = named_node(layer, "Reshape", [turned.outputs[0], shape], "kernel", {})
    operands = [kernel.outputs[0], *dequantize.inputs[1:]]
    weight = named_node(layer, "DequantizeLinear", operands, "dequantize_kernel", {"axis": 0})
    turned.outputs[0].shape = ir.Shape([width_out, width_in])
    kernel.outputs[0].shape = weight.outputs[0].shape = ir.Shape([width_out, width_in, 1, 1])
    turned.outputs[0].type = kernel.outputs[0].type = codes.type
    graph_of(dequantize).insert_before(dequantize, [turned, kernel, weight])
    return weight.outputs[0]


def _made_by(node: ir.Node, index: int, op_type: str) -> ir.Node:
    """What the passes before have put there."""
    found = producer(node, index, op_type)
    if found is None:
        raise ExportError(f"{node.name} has no {op_type} in front of it; products become convolutions after quantizing")
    return found


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None  # noqa: S101  # the operator requires it
    return value


def _sizes(weight: ir.Value) -> tuple[int, ...]:
    assert weight.shape is not None  # noqa: S101  # a constant, or made of one here
    return tuple(size for size in weight.shape if isinstance(size, int))
