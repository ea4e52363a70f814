"""Which values stay float32 where the rest is bfloat16, as a list in the graph's metadata.

Where OpenVINO is told to compute in bfloat16 it rounds every float tensor before the last product to 8 bits. On a U-Net
nearly all of the loss comes from three places that take a hundredth of a step: the ends, where the sample is read and
the output made, and the statistics of the norms (docs/adr/0020). These stay float32; the large tensors between them are
bfloat16.

- What begins: everything up to the second product, which is the timestep's own arithmetic (8 bits cannot tell 993 from
  994), the first convolution and the norm behind it.
- What ends, behind the last product but one: the sum that the last norm reads, the norm, its activation, the last
  convolution, the sampler's update.
- What norms compute for each channel or group. The sums over large tensors accumulate in float32 by themselves.
- What is computed of the timestep and a label for each channel (``exact_weights`` says why).

All of it is found by the graph's structure.
"""

import math
from collections.abc import Iterable

import onnx_ir as ir
from onnx_ir.passes import common

from qdm_deploy.artifacts.float32_values import FLOAT32_VALUES_KEY, join_names
from qdm_export.passes.base import GraphPass, cast, constant, insert_after, values_of
from qdm_export.passes.exact_weights import has_no_positions
from qdm_export.rewrites import Found
from qdm_export.topology import layer_nodes

__all__ = ["Float32Values"]

_PRODUCTS = frozenset({"Conv", "MatMul", "Gemm"})
_STATISTICS = frozenset({"ReduceMean", "ReduceL2"})


class Float32Values(GraphPass):
    """Lists these values, and casts what norms hand on to the large tensors to bfloat16 and back.

    The plugin makes the casts part of the kernels beside them, where it would else put a reorder of its own on every
    edge between the two types.
    """

    name = "float32 values"

    def requires(self, model: ir.Model) -> None:
        """Check that all is float32 yet."""
        halves = [value for node in model.graph for value in node.outputs if value.dtype == ir.DataType.BFLOAT16]
        if halves:
            raise ir.passes.PreconditionError(f"{halves[0].name} is bfloat16 already")

    def rewrite(self, model: ir.Model) -> Found:
        """List and cast."""
        common.ShapeInferencePass()(model)
        nodes = list(model.graph)
        from_inputs = _following(nodes, {value: None for value in model.graph.inputs})
        products = [node for node in nodes if node.op_type in _PRODUCTS]
        behind_product = _following(nodes, _results(products))
        later = [node for node in products if node.op_type != "Conv" or node in behind_product]
        begun = {*_following(nodes, _results(later)), *later}
        before_product = _leading_to(nodes, products)
        earlier = [node for node in products if node in before_product]
        before_earlier = _leading_to(nodes, earlier)
        before_end = {*before_earlier, *earlier}
        of_channels = _of_channels(nodes)

        def stays(node: ir.Node) -> bool:
            vector = has_no_positions(node.outputs[0]) and node.op_type not in _STATISTICS
            return node not in begun or node not in before_end or node in of_channels or vector

        kept = [node for node in nodes if node in from_inputs and stays(node)]
        kept += _add_biases(model, {node for node in earlier if node not in before_earlier})
        kept += _hand_over([node for node in kept if node in of_channels and node.op_type == "Reshape"], set(kept))
        common.RemoveUnusedNodesPass()(model)
        marked = set(kept)
        names = [str(value.name) for node in model.graph for value in node.outputs if node in marked]
        model.metadata_props[FLOAT32_VALUES_KEY] = join_names(names)
        return Found(done=names)


def _results(nodes: Iterable[ir.Node]) -> dict[ir.Value, None]:
    return {value: None for node in nodes for value in node.outputs}


def _following(nodes: Iterable[ir.Node], origins: dict[ir.Value, None]) -> set[ir.Node]:
    """What reads, at any distance, one of ``origins``; ``nodes`` are in an order that they can run in."""
    reached, found = dict(origins), set[ir.Node]()
    for node in nodes:
        if any(value in reached for value in node.inputs if value is not None):
            found.add(node)
            reached.update(_results([node]))
    return found


def _leading_to(nodes: list[ir.Node], ends: Iterable[ir.Node]) -> set[ir.Node]:
    """What one of ``ends`` depends on."""
    wanted, last, found = set[ir.Value | None](), set(ends), set[ir.Node]()
    for node in reversed(nodes):
        if any(value in wanted for value in node.outputs):
            found.add(node)
        if node in found or node in last:
            wanted.update(node.inputs)
    return found


def _of_channels(nodes: Iterable[ir.Node]) -> set[ir.Node]:
    """What follows a sum over positions and is no larger than it."""
    limits: dict[ir.Value | None, int] = {}  # elements of a row of the sum behind it
    found: set[ir.Node] = set()
    for node in nodes:
        size = _row_size(node.outputs[0])
        above = [limits[value] for value in node.inputs if value in limits]
        if above and size is not None and size <= max(above) and node.op_type not in _PRODUCTS:
            limits.update(dict.fromkeys(node.outputs, max(above)))
            found.add(node)
        elif node.op_type in _STATISTICS and size is not None:
            limits[node.outputs[0]] = size
    return found


def _row_size(value: ir.Value) -> int | None:
    sizes = None if value.shape is None else list(value.shape)[1:]
    if sizes is None or not all(isinstance(size, int) for size in sizes):
        return None
    return math.prod(int(size) for size in sizes)


def _add_biases(model: ir.Model, last: set[ir.Node]) -> list[ir.Node]:
    """The last products but one add their bias behind them: the sum is part of the end, and the product is not."""
    added = []
    for layer in layer_nodes(model):
        if layer.node in last and layer.kind == "conv" and layer.bias is not None:
            bias = constant(model, f"{layer.name}/bias", values_of(layer.bias).reshape(1, -1, 1, 1))
            layer.node.replace_input_with(2, None)
            added.append(insert_after(layer, "Add", [bias], "add_bias"))
    return added


def _hand_over(reshapes: list[ir.Node], kept: set[ir.Node]) -> list[ir.Node]:
    """Cast before a reshape, which moves nothing and would stand between the cast and the kernel; what stays float32."""
    made = []
    for reshape in reshapes:
        result, data = reshape.outputs[0], reshape.inputs[0]
        readers = [use for use in result.uses() if use.node not in kept]
        if not readers or data is None:
            continue
        rounded = cast(reshape, data, ir.DataType.BFLOAT16)
        shape = ir.Value(name=f"{result.name}/bfloat16", shape=result.shape, type=ir.TensorType(ir.DataType.BFLOAT16))
        shaped = ir.node("Reshape", [rounded, reshape.inputs[1]], {}, outputs=[shape], name=f"{reshape.name}/bfloat16")
        graph = reshape.graph
        graph.insert_before(reshape, shaped)
        back = cast(reshape, shape, ir.DataType.FLOAT)
        for use in readers:
            use.node.replace_input_with(use.idx, back)
        producer = rounded.producer()
        made += [] if producer is None else [producer]
    return made
