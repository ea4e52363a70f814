"""A step graph as OpenVINO reads it, and as this CPU can run it well."""

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from qdm_deploy.errors import EnvironmentProblem
from qdm_deploy.runtime.cpu import saturates_int8

__all__ = [
    "compile_graph",
    "import_openvino",
    "largest_activation",
    "multiplies_bfloat16",
    "read_graph",
    "without_bfloat16",
]


def import_openvino() -> ModuleType:
    """Import ``openvino`` without its usage telemetry.

    Importing it sends a usage event and writes into the user's home, unless the telemetry package is missing: then it
    falls back to a stub of its own. That is what it is told here, for the time of its import.

    Raises:
        EnvironmentProblem: the package is missing or cannot be loaded.
    """
    first_import = "openvino" not in sys.modules
    if first_import:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # Python's way to say "not installed"
    try:
        import openvino
    except ImportError as error:
        raise EnvironmentProblem(
            f"the openvino backend needs the openvino package ({error}): pip install 'qdm-deploy[openvino]', or use "
            "the onnxruntime backend"
        ) from error
    finally:
        if first_import:
            del sys.modules["openvino_telemetry"]
    return openvino  # type: ignore[no-any-return]


def multiplies_bfloat16(flags: frozenset[str]) -> bool:
    """Whether a CPU with these instruction sets, as ``cpu_flags`` names them, multiplies bfloat16 by itself."""
    return bool(flags & {"avx512_bf16", "amx_bf16"})


def read_graph(graph: Path, flags: frozenset[str]) -> Any:
    """Read an ONNX step graph for a CPU with these instruction sets.

    Returns:
        An ``openvino.Model``. Without instructions for bfloat16 its products of bfloat16 are of float32.

    Raises:
        Exception: of OpenVINO's, which share no base class: it cannot read the file.
        EnvironmentProblem: the openvino package is missing.
    """
    # Core.read_model would offer a damaged file to the reader of every other format, and each one complains.
    reader = import_openvino().frontend.FrontEndManager().load_by_framework("onnx")
    model = reader.convert(reader.load(graph))
    return model if multiplies_bfloat16(flags) else without_bfloat16(model)


def compile_graph(core: Any, model: Any, options: Mapping[str, object]) -> Any:
    """Compile a model that ``read_graph`` returned for the CPU.

    Where this CPU's INT8 products saturate, OpenVINO multiplies the codes in float32: as exact as integers, and as slow
    as float. It cannot mix float16 with that ("TransposeFQ ... do not have the same element type"), so float16 becomes
    float32, in place.

    OpenVINO 2026.4 fails on a few convolutions of bfloat16 whose result is added to that of an INT8 one ("object is not
    initialized"). Such a graph is compiled with products of float32.

    Raises:
        RuntimeError: OpenVINO cannot compile it.
    """
    options = dict(options)
    if saturates_int8():
        options["LP_TRANSFORMS_MODE"] = "NO"
        model = _widened(model, import_openvino().Type.f16)
    try:
        return core.compile_model(model, "CPU", options)
    except RuntimeError:
        if not _holds_bfloat16(model):
            raise
        return core.compile_model(without_bfloat16(model), "CPU", options)


def _holds_bfloat16(model: Any) -> bool:
    half = import_openvino().Type.bf16
    return any(output.get_element_type() == half for node in model.get_ops() for output in node.outputs())


def largest_activation(model: Any) -> int:
    """Bytes that one row takes in the largest tensor between layers, of a model with dynamic first axes."""
    largest = 0
    for output in (output for node in model.get_ops() for output in node.outputs()):
        shape = list(output.get_partial_shape())
        if len(shape) > 1 and shape[0].is_dynamic and all(axis.is_static for axis in shape[1:]):
            row = math.prod(axis.get_length() for axis in shape[1:])
            largest = max(largest, row * output.get_element_type().size)
    return largest


def without_bfloat16(model: Any) -> Any:
    """The same model, changed in place: every bfloat16 is a float32, and what converts between the two is gone.

    Where a CPU has AVX-512 but no bfloat16, OpenVINO 2026.4 would emulate it and take three times as long as in
    float32. Weights keep the values that bfloat16 gave them.
    """
    return _widened(model, import_openvino().Type.bf16)


def _widened(model: Any, half: Any) -> Any:
    """The same model, changed in place: everything of the type ``half`` is a float32."""
    openvino = import_openvino()
    inputs = [(item, item.get_names()) for item in model.inputs]
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        if kind == "Constant" and node.get_output_element_type(0) == half:
            wide = openvino.opset13.constant(node.get_data(dtype=np.float32))
        elif kind == "Convert" and half in (node.get_input_element_type(0), node.get_output_element_type(0)):
            if node.get_input_element_type(0).is_real():
                node.output(0).replace(node.input_value(0))
                continue
            wide = openvino.opset13.convert(node.input_value(0), "f32")  # codes
        else:
            continue
        wide.set_friendly_name(node.get_friendly_name())
        node.output(0).replace(wide.output(0))
    for item, names in inputs:  # what took a conversion's place took its names too
        item.set_names(names)
    model.validate_nodes_and_infer_types()
    return model
