"""Upsampling and the INT8 convolution behind it as four small convolutions: 16 products where there were 36.

The integers are the same (``artifacts/phase_sums.py``). What stood between the upsampling and the kernel, a factor per
channel, a gain per sample, the quantize, does not care for positions and works on the small tensor, a quarter as large.
"""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from qdm_deploy.artifacts.phase_sums import PHASES, fits_phases, phase_sums
from qdm_deploy.artifacts.plan import LayerPlan
from qdm_deploy.errors import ExportError
from qdm_export.metadata import LAYER_KEY, PART_KEY, PHASE_KEY
from qdm_export.passes.base import (
    PlanPass,
    constant,
    graph_of,
    named_node,
    place_of,
    planned_nodes,
    producer_of,
    require_integers,
)
from qdm_export.rewrites import Found, Place
from qdm_export.topology import LayerNode, doubles_size, layer_nodes

__all__ = ["UpsamplePhases"]


class UpsamplePhases(PlanPass):
    """Runs behind the passes that quantize: each phase has its own codes and zero points.

    All share scales and bias. Its places are the upsamplings.
    """

    name = "upsampling"

    def requires(self, model: ir.Model) -> None:
        """Inputs and weights are codes."""
        require_integers(model, self.plan, 0, 1)

    def promised(self, model: ir.Model) -> list[Place]:
        """Every Resize that leads to one layer, an INT8 convolution of 3x3."""
        kernels = {item.node: item.name for item in layer_nodes(model)}
        planned = {item.name for item in self.plan.quantized if item.layer.weight_shape[2:] == (3, 3)}
        behind = {node: _next_layers(node, kernels) for node in _upsamplings(model)}
        return [place_of(node) for node, names in behind.items() if len(names) == 1 and names <= planned]

    def rewrite(self, model: ir.Model) -> Found:
        """Replace what fits."""
        found = Found()
        layers = {layer.node: (plan, layer) for plan, layer in planned_nodes(model, self.plan)}
        for resize in _upsamplings(model):
            name = place_of(resize).name
            reader = _reader_behind(resize)
            if reader not in layers:
                reader_text = "several nodes read" if reader is None else f"{reader.op_type} {reader.name} reads"
                found.missed[name] = f"{reader_text} it, and not an INT8 layer alone"
                continue
            plan, layer = layers[reader]
            if not doubles_size(resize):
                found.left[name] = "it does not double height and width"
            elif not plan.layer.upsampled:
                found.missed[name] = f"it, or {plan.name} behind it, is not of the form that is taken apart"
            elif not fits_phases(plan):
                found.left[name] = f"the summed codes of {plan.name} do not fit 8 bits"
            else:
                _skip_upsampling(layer)
                self._in_phases(model, plan, layer)
                found.done.append(name)
        return found

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
        dequantize = producer_of(whole.inputs[1])
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


def _upsamplings(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == "Resize"]


def _next_layers(node: ir.Node, kernels: Mapping[ir.Node, str]) -> set[str]:
    """The layers that a node leads to without another layer in between."""
    found: set[str] = set()
    seen, queue = {node}, [node]
    while queue:
        for value in queue.pop().outputs:
            for use in value.uses():
                if use.node in kernels:
                    found.add(kernels[use.node])
                elif use.node not in seen:
                    seen.add(use.node)
                    queue.append(use.node)
    return found


def _reader_behind(resize: ir.Node) -> ir.Node | None:
    """The one node that reads what was inserted for a layer behind the upsampling; None where there are several."""
    readers = list(resize.outputs[0].uses())
    while len(readers) == 1:
        node = readers[0].node
        if LAYER_KEY not in node.metadata_props or PHASE_KEY in node.metadata_props:
            return node
        readers = list(node.outputs[0].uses())
    return None


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
    if len(readers) == 1 and readers[0].node.metadata_props.get(PART_KEY) == "quantize_output":
        return [layer.node, readers[0].node]
    return [layer.node]
