"""The precision of what is not INT8 on OpenVINO, and what stays float32 whatever it is.

Under the bf16 hint OpenVINO rounds every float tensor before the last product to 8 bits. On a U-Net nearly all of the
loss comes from three places that take a hundredth of a step: the ends, where the sample is read and the output made,
and the statistics of the norms (docs/adr/0020). These are marked to stay float32; the large tensors between them are
bfloat16.

The mark is OpenVINO's own ("precise"; its CPU plugin heeds it for bfloat16 too). Python has no constructor for it, so
it is taken from a graph that was read from text, under the name that this OpenVINO gives it.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from qdm_deploy.backends.openvino.graph import import_openvino
from qdm_deploy.backends.openvino.weights import has_no_positions

__all__ = ["choose_precision", "keep_float32"]

_MARKED = """<?xml version="1.0"?>
<net name="marked" version="11">
    <layers>
        <layer id="0" name="input" type="Parameter" version="opset1">
            <data shape="1" element_type="f32"/>
            <output><port id="0" precision="FP32"><dim>1</dim></port></output>
        </layer>
        <layer id="1" name="marked" type="ReLU" version="opset1">
            <rt_info><attribute name="precise" version="0"/></rt_info>
            <input><port id="0" precision="FP32"><dim>1</dim></port></input>
            <output><port id="1" precision="FP32"><dim>1</dim></port></output>
        </layer>
        <layer id="2" name="output" type="Result" version="opset1">
            <input><port id="0" precision="FP32"><dim>1</dim></port></input>
        </layer>
    </layers>
    <edges>
        <edge from-layer="0" from-port="0" to-layer="1" to-port="0"/>
        <edge from-layer="1" from-port="1" to-layer="2" to-port="0"/>
    </edges>
</net>
"""
_CONVOLUTIONS = frozenset({"Convolution", "GroupConvolution"})
_PRODUCTS = _CONVOLUTIONS | {"MatMul"}
_STATISTICS = frozenset({"ReduceMean", "ReduceL2"})


def choose_precision(asked: str, flags: frozenset[str]) -> tuple[str, str]:
    """Precision of what is not INT8, and the reason.

    Args:
        asked: "bf16", "f32" or "auto".
        flags: instruction sets of the CPU, as ``cpu_flags`` names them.

    Returns:
        "bf16" or "f32", and a sentence for ``describe()``.
    """
    if asked != "auto":
        return asked, "asked for"
    if "amx_bf16" in flags:
        return "bf16", "this CPU multiplies bf16 matrices (AMX)"
    # With AVX512-BF16 alone a bf16 rest takes up to 8 % off a step, and 0.8 dB (docs/adr/0020).
    return "f32", "this CPU has no bf16 matrix unit (AMX)"


def keep_float32(model: Any) -> int:
    """Mark what must stay float32 under a bf16 hint, in place.

    - What begins: everything up to the second product, which is the timestep's own arithmetic (8 bits cannot tell 993
      from 994), the first convolution and the norm behind it.
    - What ends, behind the last product but one: the sum that the last norm reads, the norm, its activation, the last
      convolution, the sampler's update.
    - What norms compute for each channel or group. The sums over large tensors accumulate in float32 by themselves.
    - What is computed of the timestep and a label for each channel: ``keep_weights_exact`` says why.

    Args:
        model: an ``openvino.Model`` of a step graph.

    Returns:
        How many operations were marked.
    """
    nodes = model.get_ordered_ops()
    inputs, products, convolutions = (
        {node.get_friendly_name() for node in nodes if node.get_type_name() in kinds}
        for kinds in (frozenset({"Parameter"}), _PRODUCTS, _CONVOLUTIONS)
    )
    read = {node.get_friendly_name(): _names_read(node) for node in nodes}  # in the graph's order
    from_inputs = _following(read, inputs)
    later = products - (convolutions - _following(read, products))  # not the first convolutions
    begun = _following(read, later) | later
    earlier = products & _leading_to(read, products)  # not the last ones
    before_end = _leading_to(read, earlier) | earlier
    of_channels = _of_channels(nodes, read)
    kept = [
        node
        for node in nodes
        if (name := node.get_friendly_name()) in from_inputs
        and node.get_type_name() != "Result"
        and (
            name not in begun
            or name not in before_end
            or name in of_channels
            or (has_no_positions(node) and node.get_type_name() not in _STATISTICS)
        )
    ]
    mark = _mark()
    for node in kept:
        node.set_rt_info(*mark)
    _hand_over(kept, of_channels, mark)
    model.validate_nodes_and_infer_types()
    return len(kept)


def _hand_over(kept: list[Any], of_channels: set[str], mark: tuple[Any, str]) -> None:
    """Casts between float32 and bfloat16 that become parts of the kernels beside them.

    Without them OpenVINO puts a reorder of its own on every edge between the two.
    """
    opset = import_openvino().opset13
    names = {node.get_friendly_name() for node in kept}

    def cast(value: Any, kind: str, *, keep: bool) -> Any:
        made = opset.convert(value, kind)
        if keep:
            made.set_rt_info(*mark)
        return made.output(0)

    for node in kept:
        name = node.get_friendly_name()
        if name in of_channels and node.get_type_name() == "Reshape":
            readers = [
                reader
                for reader in node.output(0).get_target_inputs()
                if reader.get_node().get_friendly_name() not in names
            ]
            if readers:
                # Before the reshape, which moves nothing and would stand between the cast and the kernel.
                rounded = cast(node.input_value(0), "bf16", keep=True)
                shaped = opset.reshape(rounded, node.input_value(1), node.get_attributes()["special_zero"])
                back = cast(shaped.output(0), "f32", keep=False)
                for reader in readers:
                    reader.replace_source_output(back)


def _mark() -> tuple[Any, str]:
    """The mark's value and name, as ``set_rt_info`` takes them."""
    model = import_openvino().Core().read_model(_MARKED.encode(), b"")
    node = next(node for node in model.get_ops() if node.get_friendly_name() == "marked")
    (name,) = node.get_rt_info()
    return node.get_rt_info()[name], name


def _names_read(node: Any) -> list[str]:
    return [value.get_node().get_friendly_name() for value in node.input_values()]


def _following(read: Mapping[str, list[str]], origins: set[str]) -> set[str]:
    """Names of what reads, at any distance, one of ``origins``."""
    found: set[str] = set()
    for name, parents in read.items():
        if any(parent in origins or parent in found for parent in parents):
            found.add(name)
    return found


def _leading_to(read: Mapping[str, list[str]], ends: set[str]) -> set[str]:
    """Names of what one of ``ends`` depends on."""
    found: set[str] = set()
    for name in reversed(list(read)):
        if name in ends or name in found:
            found.update(read[name])
    return found


def _of_channels(nodes: Iterable[Any], read: Mapping[str, list[str]]) -> set[str]:
    """Names of what follows a sum over positions and is no larger than it."""
    limits: dict[str, int] = {}  # elements of a row of the sum behind it
    found: set[str] = set()
    for node in nodes:
        name, kind, size = node.get_friendly_name(), node.get_type_name(), _row_size(node)
        above = [limits[parent] for parent in read[name] if parent in limits]
        if above and size is not None and size <= max(above) and kind not in _PRODUCTS:
            limits[name] = max(above)
            found.add(name)
        elif kind in _STATISTICS and size is not None:
            limits[name] = size
    return found


def _row_size(node: Any) -> int | None:
    if not node.get_output_size():
        return None
    shape = node.get_output_partial_shape(0)
    if shape.rank.is_dynamic or any(axis.is_dynamic for axis in list(shape)[1:]):
        return None
    return math.prod(int(axis.get_length()) for axis in list(shape)[1:])
