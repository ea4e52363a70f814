"""Convolutions that a plan keeps in float, in bfloat16: for CPUs that multiply it twice as fast as float32.

Only what is multiplied is rounded, and the result once: a plan keeps a layer out of INT8 for its noise, and 8
significant bits in both factors add far less of it than 8-bit codes (docs/adr/0017). Layers that never become INT8,
such as the first and the last convolution, stay as they are, and so do shortcuts. On a CPU without bfloat16 the session
takes the casts out again.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir

from qdm_deploy.artifacts.plan import LayerPlan
from qdm_deploy.artifacts.topology import Layer
from qdm_export.passes.base import PlanPass, constant, insert_after, insert_before, values_of
from qdm_export.passes.half_precision import BFLOAT16_OPSET
from qdm_export.rewrites import Place
from qdm_export.topology import LayerNode, layer_nodes

__all__ = ["Bfloat16Kernels"]

_HALF, _FLOAT = ir.DataType.BFLOAT16, ir.DataType.FLOAT


class Bfloat16Kernels(PlanPass):
    """Casts what such a convolution multiplies to bfloat16, and its result back before the bias is added.

    Matrix products stay float32: OpenVINO 2026.4 does not compile every attention around one of bfloat16, and they are
    a small part of a U-Net.
    """

    name = "bfloat16 kernels"

    def promised(self, model: ir.Model) -> list[Place]:
        """Every convolution with neighbours that the plan keeps in float."""
        return [Place(name) for name in self._kept()]

    def apply(self, model: ir.Model, layers: Sequence[tuple[LayerPlan, LayerNode]]) -> Iterable[str]:
        """Raises the graph's opset to the first whose Conv takes bfloat16, where a layer is cast."""
        kept = self._kept()
        for layer in layer_nodes(model):
            if layer.name in kept:
                _cast(model, layer)
                model.graph.opset_imports[""] = max(model.graph.opset_imports[""], BFLOAT16_OPSET)
                yield layer.name

    def _kept(self) -> list[str]:
        in_float = [item.layer for item in self.plan.layers if item.precision == "float"]
        return [layer.name for layer in in_float if layer.float_reason is None and _has_neighbours(layer)]


def _has_neighbours(layer: Layer) -> bool:
    """Whether it is a convolution of more than one position.

    One of a single position is a shortcut: its result is a block's own, no norm in between, and it sums few products,
    so that the rounding of its weights, the same at every step, shows in the contrast of the pictures (docs/adr/0017).
    """
    return layer.kind == "conv" and any(size > 1 for size in layer.weight_shape[2:])


def _cast(model: ir.Model, layer: LayerNode) -> None:
    node = layer.node
    data = insert_before(layer, "Cast", [], "bfloat16", to=int(_HALF)).outputs[0]
    data.type = node.outputs[0].type = ir.TensorType(_HALF)
    node.replace_input_with(0, data)
    weight = (values_of(layer.weight) / 2).astype(_HALF.numpy())
    node.replace_input_with(1, constant(model, f"{layer.name}/weight_bfloat16", weight))
    if layer.bias is not None:
        node.replace_input_with(2, None)
        bias = values_of(layer.bias).reshape(1, -1, 1, 1)
        insert_after(layer, "Add", [constant(model, f"{layer.name}/bias", bias)], "add_bias")
    # Half the weights and twice the result are the same bits. Without something to multiply by in between, OpenVINO
    # 2026.4 takes the cast for one of its own around INT8, adds the bias inside, where it is rounded with the sum, and
    # reorders the result to channels first.
    insert_after(layer, "Mul", [constant(model, "bfloat16/two", np.float32(2))], "doubled")
    insert_after(layer, "Cast", [], "float32", to=int(_FLOAT))
