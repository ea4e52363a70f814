"""The files an ONNX graph is made of, read from its protobuf without the onnx package.

An engine is built from the graph and from the external data files its tensors point to, so a cache key has to cover
both. The reader walks only the messages that can hold a tensor; every other field is skipped by its length, and large
weights inside the graph are never copied.

Source: onnx.proto3 (message and field numbers), protobuf encoding guide (wire types).
"""

import mmap
from collections.abc import Iterator
from pathlib import Path

from qdm_deploy.errors import EngineError

__all__ = ["data_files"]

# message -> {field number: message it holds}
_CHILDREN: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
_KEY, _VALUE = 1, 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def data_files(graph: Path) -> tuple[Path, ...]:
    """The external data files of an ONNX file, sorted, without repeats.

    Args:
        graph: The ``.onnx`` file.

    Raises:
        EngineError: The file cannot be read or is not an ONNX protobuf, or a tensor points outside its folder or to a
            file that is not there.
    """
    try:
        with graph.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            view = memoryview(data)
            try:
                names = sorted(set(_locations(view, "model")))
            finally:
                view.release()
    except OSError as error:
        raise EngineError(f"the graph {graph} cannot be read: {error.strerror or error}") from error
    except (ValueError, IndexError) as error:
        raise EngineError(f"{graph} is not an ONNX file, or is cut short: {error}") from error
    files = []
    for name in names:
        path = graph.parent / name
        if not path.resolve().is_relative_to(graph.parent.resolve()):
            raise EngineError(f"{graph} keeps weights in '{name}', outside its own folder; such a graph is not built")
        if not path.is_file():
            raise EngineError(f"{graph} keeps weights in '{name}', and there is no such file in {graph.parent}")
        files.append(path)
    return tuple(files)


def _locations(message: memoryview, kind: str) -> Iterator[str]:
    children = _CHILDREN[kind]
    for number, payload in _fields(message):
        child = children.get(number)
        if child is None:
            continue
        if child == "entry":
            entry = {key: bytes(value) for key, value in _fields(payload)}
            if entry.get(_KEY) == b"location":
                yield entry.get(_VALUE, b"").decode()
        else:
            yield from _locations(payload, child)


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and payload of every length-delimited field."""
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        wire = tag & 7
        if wire == _VARINT:
            _, position = _varint(message, position)
        elif wire in (_FIXED64, _FIXED32):
            position += 8 if wire == _FIXED64 else 4
        elif wire == _BYTES:
            size, position = _varint(message, position)
            if position + size > len(message):
                raise ValueError(f"a field of {size} bytes ends behind the end of its message")
            yield tag >> 3, message[position : position + size]
            position += size
        else:
            raise ValueError(f"wire type {wire} is not used by ONNX")


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[position]
        value |= (byte & 0x7F) << shift
        position += 1
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("a number has more than ten bytes")
