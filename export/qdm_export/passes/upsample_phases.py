"""Upsampling and the INT8 convolution behind it as four small convolutions: 16 products where there were 36.

The integers are the same (``artifacts/phase_sums.py``). What stood between the upsampling and the kernel, a factor per
channel, a gain per sample, the quantize, does not care for positions and works on the small tensor, a quarter as large.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qdm_deploy.artifacts.phase_sums import PHASES, fits_phases, phase_sums
from qdm_deploy.artifacts.plan import LayerPlan
from qdm_deploy.errors import ExportError
from qdm_export.passes.base import PlanPass, constant, graph_of, named_node
from qdm_export.topology import PHASE_KEY, LayerNode

__all__ = ["UpsamplePhases"]


class UpsamplePhases(PlanPass):
    """Runs behind the passes that quantize: each phase has its own codes and zero points, and shares scales and bias."""

    def rewrite(self, model: ir.Model, layers: Sequence[tuple[LayerPlan, LayerNode]]) -> bool:
        """Replace what fits."""
        found = [(plan, layer) for plan, layer in layers if fits_phases(plan)]
        for plan, layer in found:
            _skip_upsampling(layer)
            self._in_phases(model, plan, layer)
        return bool(found)

    def _in_phases(self, model: ir.Model, plan: LayerPlan, layer: LayerNode) -> None:
        graph, (whole, *quantize) = graph_of(layer.node), _kernel_and_quantize(layer)
        end = (quantize or [whole])[0].outputs[0]
        results = []
        for number, phase in enumerate(PHASES):
            result = self._phase(model, plan, layer, phase).outputs[0]
            for node in quantize:  # codes are put in their places, a quarter of the bytes
                operands = [result, *node.inputs[1:]]
                again = named_node(layer, "QuantizeLinear", operands, f"quantize_phase_{number}", {})
                graph.insert_before(whole, again)
                result = again.outputs[0]
            result.type = end.type
            results.append(result)
        joined = named_node(layer, "Concat", results, "phases", {"axis": 1})
        placed = named_node(layer, "DepthToSpace", joined.outputs, "interleave", {"blocksize": 2, "mode": "DCR"})
        joined.outputs[0].shape = None
        joined.outputs[0].type = placed.outputs[0].type = end.type
        placed.outputs[0].shape = end.shape
        graph.insert_before(whole, [joined, placed])
        for reader in list(end.uses()):
            reader.node.replace_input_with(reader.idx, placed.outputs[0])
        graph.remove([*quantize, whole], safe=True)

    def _phase(self, model: ir.Model, plan: LayerPlan, layer: LayerNode, phase: tuple[int, int]) -> ir.Node:
        graph, whole, number = graph_of(layer.node), layer.node, PHASES.index(phase)
        dequantize = None if whole.inputs[1] is None else whole.inputs[1].producer()
        if dequantize is None or dequantize.op_type != "DequantizeLinear":
            raise ExportError(f"the weight of {plan.name} is not quantized yet; phases are made after weights")
        label = f"phase_{number}"
        codes = constant(model, f"{layer.name}/{label}/weight_codes", phase_sums(plan.codes, phase).astype(np.int8))
        # Its own: where ONNX Runtime 1.32 turns weights into u8, it refuses a zero point of two weights.
        zero = constant(
            model, f"{layer.name}/{label}/weight_zero_point", np.zeros(len(plan.weight_scales), dtype=np.int8)
        )
        operands = [codes, dequantize.inputs[1], zero]
        weight = named_node(layer, "DequantizeLinear", operands, f"{label}/dequantize_weight", {"axis": 0})
        # An even row reads the pixel above and its own, an odd one its own and the one below.
        before, after = [1 - parity for parity in phase], list(phase)
        operands = [whole.inputs[0], weight.outputs[0], *whole.inputs[2:]]
        part = named_node(layer, "Conv", operands, label, {"pads": [*before, *after]})
        part.outputs[0].shape = None  # other channels than its input; nobody asks for it
        if number:
            part.metadata_props[PHASE_KEY] = str(number)
        else:
            part.name = layer.name
        graph.insert_before(whole, [weight, part])
        return part


def _skip_upsampling(layer: LayerNode) -> None:
    """What leads from the upsampling to the kernel, one operation after the other, reads the small tensor."""
    node = layer.node
    between: list[ir.Value] = []
    while (data := node.inputs[0]) is not None and (producer := data.producer()) is not None:
        if producer.op_type == "Resize":
            small = producer.inputs[0]
            node.replace_input_with(0, small)
            for value in between:
                value.shape = None if small is None else small.shape
            return
        between.append(data)
        node = producer
    raise ExportError(f"no upsampling stands before {layer.name}")


def _kernel_and_quantize(layer: LayerNode) -> list[ir.Node]:
    """The kernel's node, and the quantize of its result where the target has one."""
    readers = list(layer.node.outputs[0].uses())
    if (
        len(readers) == 1
        and readers[0].node.op_type == "QuantizeLinear"
        and readers[0].node.name == f"{layer.name}/quantize_output"
    ):
        return [layer.node, readers[0].node]
    return [layer.node]
