"""SiLU as a ratio of two polynomials, for OpenVINO's CPU plugin.

SiLU stands before nearly every INT8 convolution, fused with the norm's scale and shift and the quantize, and takes most
of that kernel's time: the plugin evaluates an exponential that is exact in every range. The sigmoid is a shifted tanh,
tanh(y / 2) is odd and all but flat from 14 on, so y P(y^2) / Q(y^2) with two cubics, on y held within 14, meets it.
SiLU is then off by at most 1.3e-5: a thousandth of a step of the 8-bit codes that it is rounded to.
"""

import numpy as np
import onnx_ir as ir

from qdm_export.passes.base import NodePass, NoMatch, add_before, constant

__all__ = ["LIMIT", "RationalSilu"]

# Sigmoid(y) - 1/2 = t P(t^2) / Q(t^2) with t = y held within +-LIMIT; coefficients of rising powers. Fitted to the
# smallest largest error of SiLU, with the value at LIMIT fixed to 1/2, so that SiLU ends at 0 and at y.
LIMIT = 14.0
_NUMERATOR = (0.2499963832147395, 0.007659802833458691, 3.5039554256862074e-05, 1.4884228598238439e-08)
_DENOMINATOR = (1.0, 0.1139627955622323, 0.0013057845554718729, 2.173492909240203e-06)


class RationalSilu(NodePass):
    """Rewrites every SiLU over positions. That of the time embedding is a vector, and stays as it is."""

    name = "SiLU"

    def places(self, model: ir.Model) -> list[ir.Node]:
        """Every Sigmoid or Swish but those of vectors."""
        return [node for node in model.graph if node.op_type in ("Sigmoid", "Swish") and not _of_vectors(node)]

    def at(self, model: ir.Model, node: ir.Node) -> None:
        """Put the ratio in the place of the product; a Sigmoid then has no reader, and goes with the unused nodes."""
        data, product = node.inputs[0], node if node.op_type == "Swish" else _product(node)
        if data is None or data.dtype != ir.DataType.FLOAT:
            raise NoMatch("its input is not float32")
        product.outputs[0].replace_all_uses_with(_Builder(model, product, data).silu(), replace_graph_outputs=True)
        model.graph.remove(product, safe=True)


def _of_vectors(node: ir.Node) -> bool:
    shape = None if node.inputs[0] is None else node.inputs[0].shape
    return shape is not None and len(shape) < 3


def _product(sigmoid: ir.Node) -> ir.Node:
    """x * sigmoid(x)."""
    readers = list(sigmoid.outputs[0].uses())
    if len(readers) != 1:
        raise NoMatch(f"{len(readers)} nodes read it, and not one multiplication")
    product, place = readers[0].node, readers[0].idx
    if product.op_type != "Mul" or product.inputs[1 - place] is not sigmoid.inputs[0]:
        raise NoMatch(f"{product.op_type} {product.name} reads it, and does not multiply it by its own input")
    return product


class _Builder:
    """Adds the nodes of one SiLU before the node that it replaces, in that node's name."""

    def __init__(self, model: ir.Model, node: ir.Node, data: ir.Value) -> None:
        self.model, self.node, self.data = model, node, data

    def silu(self) -> ir.Value:
        """y (1/2 + t P(t^2) / Q(t^2))."""
        y = self.data
        t = self.add("Clip", "held", y, -LIMIT, LIMIT)
        square = self.add("Mul", "square", t, t)
        above = self.add("Mul", "odd", self.polynomial("numerator", square, _NUMERATOR), t)
        ratio = self.add("Div", "ratio", above, self.polynomial("denominator", square, _DENOMINATOR))
        return self.add("Mul", "silu", y, self.add("Add", "sigmoid", ratio, 0.5))

    def polynomial(self, label: str, value: ir.Value, coefficients: tuple[float, ...]) -> ir.Value | float:
        """By Horner's rule, one multiply and one add for each power."""
        result: ir.Value | float = coefficients[-1]
        for power in range(len(coefficients) - 2, -1, -1):
            result = self.add("Mul", f"{label}/times_{power}", value, result)
            result = self.add("Add", f"{label}/plus_{power}", result, coefficients[power])
        return result

    def add(self, op_type: str, label: str, *operands: ir.Value | float) -> ir.Value:
        """A node of the data's shape; numbers become constants that all SiLUs share."""
        inputs = [self.number(item) if isinstance(item, float) else item for item in operands]
        return add_before(self.node, op_type, inputs, label, self.data.shape)

    def number(self, value: float) -> ir.Value:
        """A scalar float32 constant."""
        return constant(self.model, f"silu/{value!r}", np.float32(value))
