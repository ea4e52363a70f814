"""Float16 or bfloat16 for the part of the U-Net that works on the sample, for strongly typed TensorRT networks.

Types are settled here once: the builder of a strongly typed network follows them and inserts no casts of its own. The
time embedding and the sampler update stay float32; a Cast stands at each border, none between a quantize and its
kernel. Bfloat16 is for models that leave the range of float16: it has 8 significant bits, float16 has 11.
"""

from typing import Self

import numpy as np
import onnx_ir as ir

from qdm_deploy.errors import ExportError
from qdm_export.metadata import LAYER_KEY, MODULE_KEY
from qdm_export.passes.base import GraphPass, Settings, cast, values_of
from qdm_export.rewrites import Found, Place
from qdm_export.topology import layer_nodes

__all__ = ["BFLOAT16_OPSET", "HalfPrecision"]

# Inputs that ONNX wants in float32 whatever the data is.
_FLOAT32_INPUTS = {"Resize": (1, 2)}
_FLOAT = ir.DataType.FLOAT
# The first whose Conv takes bfloat16.
BFLOAT16_OPSET = 22


class HalfPrecision(GraphPass):
    """Retypes the nodes between the sample and the model's output.

    Args:
        half: FLOAT16, or BFLOAT16, which raises the graph's opset to 22.
    """

    name = "half precision"

    def __init__(self, half: ir.DataType = ir.DataType.FLOAT16) -> None:
        super().__init__()
        self._half, self._text = half, half.name.lower()

    @classmethod
    def made(cls, settings: Settings) -> Self:
        """In the type of the target's rest."""
        return cls(settings.rest)

    def promised(self, model: ir.Model) -> list[Place]:
        """Every layer that works on the sample."""
        return [Place(name) for name in self._layers(model, self._region(model))]

    def ensures(self, model: ir.Model) -> None:
        """Nothing that works on the sample is float32 any more."""
        for node in self._region(model):
            if any(value.dtype == _FLOAT for value in node.outputs):
                raise ir.passes.PostconditionError(f"{node.name} computes in float32 still")

    def rewrite(self, model: ir.Model) -> Found:
        """Retype the nodes, and cast at the borders."""
        region = self._region(model)
        if self._half == ir.DataType.BFLOAT16:
            model.graph.opset_imports[""] = max(model.graph.opset_imports[""], BFLOAT16_OPSET)
        inside = {value for node in region for value in node.outputs}
        casts: dict[ir.Value, ir.Value] = {}
        for node in region:
            for index, value in enumerate(node.inputs):
                if (
                    value is None
                    or value in inside
                    or value.dtype != _FLOAT
                    or index in _FLOAT32_INPUTS.get(node.op_type, ())
                ):
                    continue
                if value not in casts:
                    casts[value] = (
                        self._constant(model, value) if value.is_initializer() else cast(node, value, self._half)
                    )
                node.replace_input_with(index, casts[value])
            if node.op_type == "Cast" and node.attributes["to"].as_int() == _FLOAT:
                node.attributes["to"] = ir.AttrInt64("to", int(self._half))
            for value in node.outputs:
                if value.dtype in (_FLOAT, None):
                    value.type = ir.TensorType(self._half)  # not value.dtype: clones share the type object
        self._leave(model, region)
        return Found(done=self._layers(model, region))

    def _layers(self, model: ir.Model, region: list[ir.Node]) -> list[str]:
        inside = set(region)
        return [item.name for item in layer_nodes(model) if item.node in inside]

    def _region(self, model: ir.Model) -> list[ir.Node]:
        """Nodes of the U-Net whose values depend on the sample, and the gains and weights that multiply them."""
        on_sample = {value for value in model.graph.inputs if value.name == "sample"}
        region = []
        for node in model.graph:
            reads_sample = node.op_type != "Shape" and any(value in on_sample for value in node.inputs)
            if reads_sample:
                on_sample.update(node.outputs)
            if MODULE_KEY in node.metadata_props and (reads_sample or _feeds_only(node, "DequantizeLinear", "Gather")):
                region.append(node)
        return region

    def _leave(self, model: ir.Model, region: list[ir.Node]) -> None:
        inside = set(region)
        for node in region:
            for value in node.outputs:
                outside = [use for use in value.uses() if use.node not in inside and value.dtype == self._half]
                if outside:
                    back = cast(node, value, _FLOAT, after=True)
                    for use in outside:
                        use.node.replace_input_with(use.idx, back)

    def _constant(self, model: ir.Model, value: ir.Value) -> ir.Value:
        name = f"{value.name}/{self._text}"
        with np.errstate(over="ignore"):
            values = values_of(value).astype(self._half.numpy())
        if not np.isfinite(values).all():
            raise ExportError(
                f"{value.name} holds {np.abs(values_of(value)).max():.3g}, which {self._text} cannot hold; "
                "let the rest be bfloat16 (--rest bf16)"
            )
        tensor = ir.tensor(values, name=name)
        half = ir.Value(name=name, shape=value.shape, type=ir.TensorType(self._half), const_value=tensor)
        model.graph.register_initializer(half)
        return half


def _feeds_only(node: ir.Node, *kinds: str) -> bool:
    """A weight's DequantizeLinear or a gain's Gather: they read no sample but what they make multiplies one."""
    return (
        node.op_type in kinds
        and node.inputs[0] is not None
        and node.inputs[0].is_initializer()
        and LAYER_KEY in node.metadata_props
    )
