"""The network's structure, read from the exported graph: layers, what they share, and where skip branches meet.

Nothing here goes by names: branches are found by walking from a layer's input back to the Concat it came through, the
time-embedding path by not depending on the sample, the first and last convolution by having no layer before or after.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from qdm_deploy.artifacts.topology import Layer, Topology
from qdm_deploy.errors import ExportError
from qdm_export.linear_path import linear_path
from qdm_export.metadata import MODULE_KEY, PHASE_KEY

__all__ = [
    "MIN_CHANNELS",
    "LayerNode",
    "doubles_size",
    "layer_nodes",
    "reached_from",
    "silu_input",
    "topology_of",
    "weight_is_transposed",
]

_PREFIX = "net.unet."
# Below this width an INT8 tensor-core kernel pads its way to being slower than float (NVIDIA's own quantizer skips them
# too).
MIN_CHANNELS = 16
# Operators that keep every channel in its place; a skip branch stays recognisable through them.
_CHANNELWISE = {"Resize", "Pad", "Identity", "Cast", "Dropout"}
_NORMS = {"GroupNormalization", "InstanceNormalization", "LayerNormalization", "BatchNormalization"}
_NORM_REACH = _CHANNELWISE | {"Transpose", "Reshape", "Relu", "Gelu"}


@dataclass(frozen=True)
class LayerNode:
    """A layer's node in the graph; ``bias`` is the Conv/Gemm input or the Add behind a MatMul, where there is one."""

    name: str
    node: ir.Node
    kind: Literal["conv", "linear"]
    data: ir.Value
    weight: ir.Value
    bias: ir.Value | None
    bias_add: ir.Node | None

    @property
    def output(self) -> ir.Value:
        """The layer's result, its bias included."""
        return (self.bias_add or self.node).outputs[0]


def layer_nodes(model: ir.Model) -> list[LayerNode]:
    """Every Conv, Gemm and MatMul with a constant weight, in execution order."""
    found = []
    for node in model.graph:
        if node.op_type not in ("Conv", "Gemm", "MatMul") or PHASE_KEY in node.metadata_props:
            continue
        data, weight = node.inputs[0], node.inputs[1]
        if data is None or weight is None or not _is_weight(weight):
            continue
        name = _module_path(node)
        if node.op_type == "MatMul":
            bias_add = _bias_add(node)
            bias = (
                None if bias_add is None else next(v for v in bias_add.inputs if v is not None and v.is_initializer())
            )
        else:
            bias_add, bias = None, node.inputs[2] if len(node.inputs) > 2 else None
        found.append(
            LayerNode(name, node, "conv" if node.op_type == "Conv" else "linear", data, weight, bias, bias_add)
        )
    names = [layer.name for layer in found]
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ExportError(
            f"these layers run more than once per step, which a per-layer plan cannot describe: {', '.join(twice)}"
        )
    return found


def weight_is_transposed(node: ir.Node) -> bool:
    """Whether the node reads its weight as [I, O] where PyTorch stores [O, I]."""
    return node.op_type == "MatMul" or (node.op_type == "Gemm" and _int(node, "transB", 0) == 0)


def topology_of(model: ir.Model) -> Topology:
    """The layers of an exported step graph, in execution order."""
    nodes = layer_nodes(model)
    on_sample = reached_from(model, [value for value in model.graph.inputs if value.name == "sample"])
    behind_layer = reached_from(model, [item.output for item in nodes if item.output in on_sample])
    before_layer = _leading_to(model, [item.data for item in nodes])
    first_reader: dict[ir.Value, str] = {}
    layers = []
    for item in nodes:
        shape = _weight_shape(item)
        branches, normalized = _trace(item.data, shape[1])
        layers.append(
            Layer(
                name=item.name,
                kind=item.kind,
                weight_shape=shape,
                input_group=first_reader.setdefault(item.data, item.name),
                branches=branches,
                normalized=normalized,
                strides=_ints(item.node, "strides", (1, 1)) if item.kind == "conv" else (),
                pads=_ints(item.node, "pads", (0, 0, 0, 0)) if item.kind == "conv" else (),
                spatial=_spatial(item) if item.kind == "conv" else None,
                float_reason=_float_reason(item, shape, on_sample, behind_layer, before_layer),
                feeds_norm=_feeds_norm(item.output),
                upsampled=_reads_upsampled(item),
                absorber=_absorber(item, {other.node for other in nodes}),
            )
        )
    return Topology(tuple(layers))


def _is_weight(value: ir.Value) -> bool:
    """A constant, or the dequantized codes of one, which may be packed."""
    producer = value.producer()
    if producer is None or producer.op_type != "DequantizeLinear":
        return value.is_initializer()
    codes = producer.inputs[0]
    unpack = None if codes is None else codes.producer()
    if unpack is not None and unpack.op_type == "Cast":
        codes = unpack.inputs[0]
    return codes is not None and codes.is_initializer()


def _module_path(node: ir.Node) -> str:
    path = node.metadata_props.get(MODULE_KEY, "")
    if not path.startswith(_PREFIX):
        raise ExportError(
            f"node {node.name!r} ({node.op_type}) does not say which module it came from; was the graph edited?"
        )
    return path.removeprefix(_PREFIX)


def _bias_add(matmul: ir.Node) -> ir.Node | None:
    uses = list(matmul.outputs[0].uses())
    if len(uses) != 1 or uses[0].node.op_type != "Add":
        return None
    other = [value for value in uses[0].node.inputs if value is not matmul.outputs[0]]
    if len(other) == 1 and other[0] is not None and other[0].is_initializer() and _rank(other[0]) == 1:
        return uses[0].node
    return None


def _weight_shape(item: LayerNode) -> tuple[int, ...]:
    sizes = item.weight.shape
    shape = () if sizes is None else tuple(size for size in sizes if isinstance(size, int))
    if sizes is None or len(shape) != len(sizes):
        raise ExportError(f"the weight of {item.name} has no static shape: {sizes}")
    return (shape[1], shape[0]) if weight_is_transposed(item.node) else shape


def _trace(value: ir.Value, channels: int) -> tuple[tuple[int, ...], bool]:
    """Walk from a layer's input towards the Concat it came through; says what it passed on the way."""
    normalized = False
    position: ir.Value | None = value
    in_place = True  # whether the channel axis is still where the Concat put it
    while position is not None:
        node = position.producer()
        if node is None:
            break
        if node.op_type == "Concat" and in_place and _rank(position) == 4 and _int(node, "axis", 0) in (1, -3):
            widths = tuple(_channels(branch) for branch in node.inputs if branch is not None)
            return (widths, normalized) if sum(widths) == channels else ((channels,), normalized)
        if node.op_type in _NORMS:
            normalized = True
            position = node.inputs[0]
        elif (activated := silu_input(node)) is not None:
            position = activated
        elif node.op_type in _NORM_REACH:
            in_place = in_place and node.op_type in _CHANNELWISE
            position = node.inputs[0]
        else:
            break
    return (channels,), normalized


def _feeds_norm(value: ir.Value) -> bool:
    """Whether only a normalization reads ``value``, perhaps behind an addition per channel (the time embedding)."""
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output():
        return False
    node = uses[0].node
    if node.op_type in _NORMS:
        return True
    if node.op_type != "Add":
        return False
    added = next((operand for operand in node.inputs if operand is not None and operand is not value), None)
    shape = None if added is None else added.shape
    return shape is not None and len(shape) == 4 and list(shape)[2:] == [1, 1] and _feeds_norm(node.outputs[0])


def _reads_upsampled(item: LayerNode) -> bool:
    """Whether a 3x3 convolution alone reads a nearest-neighbour upsampling by two."""
    resize, node = item.data.producer(), item.node
    if item.kind != "conv" or resize is None or resize.op_type != "Resize" or len(list(item.data.uses())) != 1:
        return False
    plain = _weight_shape(item)[2:] == (3, 3) and _ints(node, "pads", (0,) * 4) == (1,) * 4
    plain = plain and _ints(node, "strides", (1, 1)) == _ints(node, "dilations", (1, 1)) == (1, 1)
    return plain and _int(node, "group", 1) == 1 and doubles_size(resize) and _repeats_pixels(resize)


def doubles_size(resize: ir.Node) -> bool:
    """Whether it makes 2x2 pixels of each pixel."""
    small, large = (None if value is None else value.shape for value in (resize.inputs[0], resize.outputs[0]))
    if small is None or large is None or len(small) != 4:
        return False
    sizes = zip(list(small)[2:], list(large)[2:], strict=True)
    return all(isinstance(before, int) and after == 2 * before for before, after in sizes)


def _repeats_pixels(resize: ir.Node) -> bool:
    """Whether a new pixel is an old one, as in ``torch.nn.functional.interpolate(..., mode="nearest")``."""
    modes = [resize.attributes.get(name) for name in ("mode", "coordinate_transformation_mode", "nearest_mode")]
    return [None if mode is None else mode.as_string() for mode in modes] == ["nearest", "asymmetric", "floor"]


def silu_input(node: ir.Node) -> ir.Value | None:
    """x for a node that computes x * sigmoid(x), else None."""
    if node.op_type == "Swish":
        return node.inputs[0]
    if node.op_type != "Mul":
        return None
    for gate, value in ((node.inputs[0], node.inputs[1]), (node.inputs[1], node.inputs[0])):
        producer = gate.producer() if gate is not None else None
        if producer is not None and producer.op_type == "Sigmoid" and producer.inputs[0] is value:
            return value
    return None


def _float_reason(
    item: LayerNode,
    shape: tuple[int, ...],
    on_sample: set[ir.Value],
    behind_layer: set[ir.Value],
    before_layer: set[ir.Value],
) -> str | None:
    if item.data not in on_sample:
        return "does not depend on the sample (time embedding or conditioning path)"
    if item.data not in behind_layer:
        return "first convolution: reads the sample itself"
    if item.output not in before_layer:
        return "last convolution: its output is the model's output"
    if min(shape[:2]) < MIN_CHANNELS:
        return f"narrower than {MIN_CHANNELS} channels"
    if item.kind == "conv":
        if _int(item.node, "group", 1) != 1:
            return "grouped convolution"
        if _ints(item.node, "dilations", (1, 1)) != (1, 1):
            return "dilated convolution"
    return None


def _absorber(item: LayerNode, layers: set[ir.Node]) -> Literal["norm", "weights"] | None:
    """What would take a factor on the layer's input; tried with a factor that differs in every channel."""
    if any(use.node not in layers or use.idx != 0 for use in item.data.uses()) or item.data.is_graph_output():
        return None
    rank, channels = _rank(item.data), _weight_shape(item)[1]
    factor = np.arange(1.0, channels + 1).reshape(
        (1, -1) + (1,) * (rank - 2) if item.kind == "conv" else (1,) * (rank - 1) + (-1,)
    )
    path = linear_path(item.data, factor)
    if path is None:
        return None
    return "weights" if path.layers else "norm"


def reached_from(model: ir.Model, sources: Sequence[ir.Value]) -> set[ir.Value]:
    """The values that depend on one of ``sources``, and they themselves; shapes say nothing of values."""
    reached = set(sources)
    for node in model.graph:  # in topological order
        if node.op_type != "Shape" and any(value in reached for value in node.inputs if value is not None):
            reached.update(node.outputs)
    return reached


def _leading_to(model: ir.Model, targets: Sequence[ir.Value]) -> set[ir.Value]:
    leading = set(targets)
    for node in reversed(model.graph):
        if any(value in leading for value in node.outputs):
            leading.update(value for value in node.inputs if value is not None)
    return leading


def _spatial(item: LayerNode) -> tuple[int, int]:
    shape = item.data.shape
    if shape is None or not isinstance(shape[2], int) or not isinstance(shape[3], int):
        raise ExportError(f"the input of {item.name} has no static height and width: {shape}")
    return shape[2], shape[3]


def _channels(value: ir.Value) -> int:
    if value.shape is None or not isinstance(value.shape[1], int):
        raise ExportError(f"{value.name} joins a skip concatenation without a static channel count: {value.shape}")
    return value.shape[1]


def _rank(value: ir.Value) -> int:
    return -1 if value.shape is None else len(value.shape)


def _int(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else int(attribute.as_int())


def _ints(node: ir.Node, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    attribute = node.attributes.get(name)
    return default if attribute is None else tuple(int(value) for value in attribute.as_ints())
