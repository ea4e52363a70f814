"""One weights file for several graphs: equal tensors are stored once.

The targets of a bundle have the same weight codes and mostly the same float tensors, so their graphs point into one
external-data file. What is equal is decided by content, not by name.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import onnx_ir as ir

from qdm_deploy.errors import ExportError

__all__ = ["save_with_shared_weights"]

# Smaller tensors (scales, shapes) stay in the graph, where a reader finds them.
_THRESHOLD_BYTES = 1024
_ALIGNMENT = 64


def save_with_shared_weights(graphs: Iterable[tuple[Path, ir.Model]], weights: Path) -> int:
    """Write ``weights`` and every graph beside it; returns the bytes that sharing saved.

    Args:
        graphs: where each goes, and the graph; asked for one at a time and let go of before the next, so that an
            iterable which makes them holds the tensors of one.
        weights: file of the tensors, in the same folder.

    Raises:
        ExportError: a graph is not in the folder of the weights file, as ONNX external data demands.
    """
    offsets: dict[str, int] = {}
    saved = 0
    with weights.open("wb") as stream:
        for path, model in graphs:
            if path.parent != weights.parent:
                raise ExportError(f"{path} and its weights {weights} must be in the same folder")
            for value in model.graph.initializers.values():
                tensor = value.const_value
                if tensor is None or tensor.nbytes < _THRESHOLD_BYTES:
                    continue
                data = tensor.tobytes()
                key = hashlib.sha256(data).hexdigest()
                if key in offsets:
                    saved += len(data)
                else:
                    stream.write(b"\0" * (-stream.tell() % _ALIGNMENT))
                    offsets[key] = stream.tell()
                    stream.write(data)
                value.const_value = ir.ExternalTensor(
                    weights.name,
                    offsets[key],
                    len(data),
                    tensor.dtype,
                    shape=ir.Shape(tensor.shape.numpy()),
                    name=value.name or "",
                    base_dir=weights.parent,
                )
            stream.flush()
            ir.save(model, path)
    return saved
