"""Reading a step graph into OpenVINO, and compiling it for this CPU."""

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from qdm_deploy.errors import EnvironmentProblem
from qdm_deploy.runtime.cpu import cpu_flags, saturates_int8

__all__ = ["compile_graph", "import_openvino", "largest_activation", "read_graph"]


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


def read_graph(graph: Path) -> Any:
    """Read an ONNX step graph.

    Returns:
        An ``openvino.Model``.

    Raises:
        Exception: of OpenVINO's, which share no base class: it cannot read the file.
        EnvironmentProblem: the openvino package is missing.
    """
    # Core.read_model would offer a damaged file to the reader of every other format, and each one complains.
    reader = import_openvino().frontend.FrontEndManager().load_by_framework("onnx")
    return reader.convert(reader.load(graph))


def compile_graph(core: Any, model: Any, options: Mapping[str, object]) -> Any:
    """Compile a model that ``read_graph`` returned for the CPU.

    Where this CPU's INT8 products saturate, OpenVINO multiplies the codes in float32: as exact as integers, and as slow
    as float.

    Raises:
        RuntimeError: OpenVINO cannot compile it.
    """
    options = dict(options)
    if saturates_int8(cpu_flags()):
        options["LP_TRANSFORMS_MODE"] = "NO"
    return core.compile_model(model, "CPU", options)


def largest_activation(model: Any) -> int:
    """Bytes that one row takes in the largest tensor between layers, of a model with dynamic first axes."""
    largest = 0
    for output in (output for node in model.get_ops() for output in node.outputs()):
        shape = list(output.get_partial_shape())
        if len(shape) > 1 and shape[0].is_dynamic and all(axis.is_static for axis in shape[1:]):
            row = math.prod(axis.get_length() for axis in shape[1:])
            largest = max(largest, row * output.get_element_type().size)
    return largest
