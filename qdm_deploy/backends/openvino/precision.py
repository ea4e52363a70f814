"""Float32 where a graph asks for it, under OpenVINO's hint to compute in bfloat16.

A graph of the target openvino-amx names the values that stay float32 (``artifacts.float32_values``). What makes them
gets OpenVINO's own mark ("precise"; its CPU plugin heeds it for bfloat16 too). Python has no constructor for the mark,
so it is taken from a graph that was read from text, under the name that this OpenVINO gives it.
"""

from typing import Any

from qdm_deploy.artifacts.float32_values import FLOAT32_VALUES_KEY, split_names
from qdm_deploy.backends.openvino.graph import import_openvino

__all__ = ["computes_bfloat16", "keep_float32"]

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
# Where the reader leaves the metadata of an ONNX file.
_METADATA = ["framework", FLOAT32_VALUES_KEY]


def computes_bfloat16(model: Any) -> bool:
    """Whether a graph, as ``read_graph`` returns it, is to be computed in bfloat16."""
    return bool(model.has_rt_info(_METADATA))


def keep_float32(model: Any) -> int:
    """Mark what makes the values that a graph names.

    What the reader made of one operator is marked together: a convolution with its bias is two.

    Args:
        model: an ``openvino.Model`` for which ``computes_bfloat16`` holds.

    Returns:
        How many operations were marked.
    """
    names, mark = split_names(str(model.get_rt_info(_METADATA).value)), _mark()
    marked: set[str] = set()
    for node in reversed(model.get_ordered_ops()):
        own = {name for output in node.outputs() for name in output.get_names()}
        readers = {
            item.get_node().get_friendly_name() for output in node.outputs() for item in output.get_target_inputs()
        }
        inside = not own and not marked.isdisjoint(readers)
        if (inside or not own.isdisjoint(names)) and node.get_type_name() not in ("Constant", "Result"):
            node.set_rt_info(*mark)
            marked.add(node.get_friendly_name())
    return len(marked)


def _mark() -> tuple[Any, str]:
    """The mark's value and name, as ``set_rt_info`` takes them."""
    model = import_openvino().Core().read_model(_MARKED.encode(), b"")
    node = next(node for node in model.get_ops() if node.get_friendly_name() == "marked")
    (name,) = node.get_rt_info()
    return node.get_rt_info()[name], name
