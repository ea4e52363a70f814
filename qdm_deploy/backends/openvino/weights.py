"""Weights of float layers that a bfloat16 rest on OpenVINO must not round.

A rounded activation errs by chance; a rounded weight errs in the same way at every step and in every picture. On the
embedded model the projections of the time embedding made all pictures brighter, and shortcuts took contrast away; SQNR
hardly shows either, distances between sets of pictures do (docs/adr/0020). The models keep their meaning here: float32
gives what it gave before.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.backends.openvino.graph import import_openvino

__all__ = ["has_no_positions", "keep_weights_exact"]


def keep_weights_exact(model: Any) -> int:
    """Change a model in place so that a bf16 hint rounds no weights of embeddings and shortcuts.

    - Products [B, K] by [K, C], which make channels of an embedding, become convolutions of a single position: these
      keep the mark that lets ``keep_float32`` hold them in float32, which the plugin drops from a matrix product.
    - Shortcuts, 1x1 convolutions in float, become two: one by the weights in bfloat16, one by what that left of them.

    Args:
        model: an ``openvino.Model`` of a step graph without bfloat16.

    Returns:
        How many layers were changed.
    """
    changed = 0
    for node in model.get_ordered_ops():
        weight = _float_weight(node)
        if weight is None:
            continue
        if node.get_type_name() == "MatMul" and has_no_positions(node):
            _as_convolution(node, weight if node.get_attributes()["transpose_b"] else weight.T)
            changed += 1
        elif node.get_type_name() == "Convolution" and weight.shape[2:] == (1, 1) and not has_no_positions(node):
            _in_two_parts(node, weight)
            changed += 1
    model.validate_nodes_and_infer_types()
    return changed


def has_no_positions(node: Any) -> bool:
    """Whether a node gives a float32 [B, C], or [B, C, 1, 1], of any number of rows."""
    if not node.get_output_size() or node.get_output_element_type(0) != import_openvino().Type.f32:
        return False
    rows, *sizes = [axis.get_length() if axis.is_static else None for axis in node.get_output_partial_shape(0)] or [1]
    return rows is None and len(sizes) > 0 and None not in sizes and all(size == 1 for size in sizes[1:])


def _float_weight(node: Any) -> NDArray[np.float32] | None:
    if node.get_type_name() not in ("MatMul", "Convolution"):
        return None
    weight = node.input_value(1).get_node()
    is_float = weight.get_type_name() == "Constant" and weight.get_output_element_type(0) == import_openvino().Type.f32
    return weight.data if is_float else None


def _as_convolution(product: Any, rows: NDArray[np.float32]) -> None:
    """Put a convolution of [B, K, 1, 1] by ``rows`` [C, K] in a product's place, its bias with it."""
    opset = import_openvino().opset13
    given = opset.reshape(product.input_value(0), np.array([0, 0, 1, 1]), special_zero=True)
    kernel = opset.constant(np.ascontiguousarray(rows)[:, :, None, None])
    made = opset.convolution(given, kernel, [1, 1], [0, 0], [0, 0], [1, 1])
    made.set_friendly_name(product.get_friendly_name())
    replaced, readers = product, _readers(product)
    if len(readers) == 1 and (bias := _bias(readers[0], len(rows))) is not None:
        replaced = readers[0]
        made = opset.add(made, opset.constant(bias.reshape(1, -1, 1, 1)))
        made.set_friendly_name(replaced.get_friendly_name())
    replaced.output(0).replace(opset.reshape(made, np.array([0, -1]), special_zero=True).output(0))


def _in_two_parts(shortcut: Any, weight: NDArray[np.float32]) -> None:
    """x w = x half(w) + x (w - half(w)); the second goes to what the shortcut is added to, where it is added.

    There the plugin makes both additions part of the two convolutions. Which way OpenVINO rounds does not matter.
    """
    openvino = import_openvino()
    opset = openvino.opset13
    half = opset.constant(weight, dtype=openvino.Type.bf16).get_data(dtype=np.float32)
    attributes = shortcut.get_attributes()
    window = [attributes[name] for name in ("strides", "pads_begin", "pads_end", "dilations")]
    rest = opset.convolution(shortcut.input_value(0), opset.constant(weight - half), *window)
    rest.set_friendly_name(f"{shortcut.get_friendly_name()}/rest")
    shortcut.input(1).replace_source_output(opset.constant(half).output(0))
    place = _sum_of_block(shortcut)
    if place is not None:
        place.replace_source_output(opset.add(rest, place.get_source_output()).output(0))
        return
    readers = list(shortcut.output(0).get_target_inputs())
    total = opset.add(shortcut, rest)
    for reader in readers:
        reader.replace_source_output(total.output(0))


def _sum_of_block(shortcut: Any) -> Any:
    """Where the other addend of the block's sum goes in, behind shortcut and bias; None where there is no such sum."""
    path = [shortcut]
    while len(path) < 3:
        readers = _readers(path[-1])
        if len(readers) != 1 or readers[0].get_type_name() != "Add":
            return None
        path.append(readers[0])
    _, biased, total = path
    name = biased.get_friendly_name()
    others = [item for item in total.inputs() if item.get_source_output().get_node().get_friendly_name() != name]
    return others[0] if len(others) == 1 else None


def _readers(node: Any) -> list[Any]:
    """What computes with a node's result; its shape is read elsewhere."""
    found = [item.get_node() for item in node.output(0).get_target_inputs()]
    return [reader for reader in found if reader.get_type_name() != "ShapeOf"]


def _bias(node: Any, channels: int) -> NDArray[np.float32] | None:
    """What an addition adds to each of so many channels, else None."""
    if node.get_type_name() != "Add":
        return None
    constants = [value.get_node() for value in node.input_values() if value.get_node().get_type_name() == "Constant"]
    return constants[0].data if constants and constants[0].data.size == channels else None
