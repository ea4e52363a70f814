"""A float convolution with very few output channels, tap by tap, for OpenVINO's CPU plugin.

The plugin computes 16 output channels at a time, so the last convolution, with 1 to 4 of them, costs what 16 would.
Here every tap of the kernel is an output channel of a 1x1 convolution, 9 for one where the kernel is 3x3; a depthwise
convolution then shifts each map to where its tap belongs, and a sum over them is the result.
"""

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qdm_export.passes.base import constant, graph_of, named_node, values_of
from qdm_export.topology import PHASE_KEY, LayerNode, layer_nodes

__all__ = ["Taps"]

# Pictures and latents have at most 4 channels. With fewer inputs than a vector holds there is little to save.
_FEW = 4
_MANY = 16


class Taps(ir.passes.InPlacePass):
    """Rewrites every such convolution that is not INT8, has stride 1, and reads at least 16 channels."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place; what has been rewritten has more channels, and stays."""
        found = [layer for layer in layer_nodes(model) if _fits(layer)]
        for layer in found:
            _by_taps(model, layer)
        return ir.passes.PassResult(model, modified=bool(found))


def _fits(layer: LayerNode) -> bool:
    if layer.kind != "conv" or not layer.weight.is_initializer() or layer.data.dtype != ir.DataType.FLOAT:
        return False
    outputs, inputs, *kernel = values_of(layer.weight).shape
    attributes = layer.node.attributes
    strides = attributes["strides"].as_ints() if "strides" in attributes else (1, 1)
    dilations = attributes["dilations"].as_ints() if "dilations" in attributes else (1, 1)
    # Of a grouped convolution the weight holds the channels of one group.
    whole = layer.data.shape is not None and layer.data.shape[1] == inputs
    unit = all(size == 1 for size in (*strides, *dilations))
    return outputs <= _FEW and inputs >= _MANY and kernel != [1, 1] and unit and whole


def _by_taps(model: ir.Model, layer: LayerNode) -> None:
    node, weight = layer.node, values_of(layer.weight)
    outputs, inputs, *kernel = weight.shape
    maps = outputs * kernel[0] * kernel[1]
    # Maps in the order output channel, row, column of the kernel.
    products = weight.transpose(0, 2, 3, 1).reshape(maps, inputs, 1, 1)
    places = np.tile(np.eye(kernel[0] * kernel[1], dtype=np.float32), (outputs, 1)).reshape(maps, 1, *kernel)
    sums = np.repeat(np.eye(outputs, dtype=np.float32), maps // outputs, axis=1).reshape(outputs, maps, 1, 1)
    pads = node.attributes["pads"].as_ints() if "pads" in node.attributes else (0, 0, 0, 0)

    def kernels(label: str, values: NDArray[np.float32]) -> ir.Value:
        return constant(model, f"{layer.name}/{label}", values)

    multiplied = named_node(layer, "Conv", [layer.data, kernels("tap_products", products)], "multiply", {})
    operands: list[ir.Value | None] = [multiplied.outputs[0], kernels("tap_places", places)]
    shifted = named_node(layer, "Conv", operands, "shift", {"pads": pads, "group": maps})
    operands = [shifted.outputs[0], kernels("tap_sums", sums), *node.inputs[2:]]
    summed = named_node(layer, "Conv", operands, "sum", {})
    multiplied.name = layer.name
    shifted.metadata_props[PHASE_KEY], summed.metadata_props[PHASE_KEY] = "1", "2"
    multiplied.outputs[0].shape = shifted.outputs[0].shape = None  # of other channels; nobody asks for it
    graph_of(node).insert_before(node, [multiplied, shifted, summed])
    summed.outputs[0].shape = node.outputs[0].shape
    node.outputs[0].replace_all_uses_with(summed.outputs[0], replace_graph_outputs=True)
    graph_of(node).remove(node, safe=True)
