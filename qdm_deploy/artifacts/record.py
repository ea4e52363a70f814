"""Saved values: one document and its arrays in one ``.safetensors`` file that notices every changed byte.

Layout: an ordinary safetensors file (any safetensors reader opens the arrays) whose metadata has one key,
``qdm_record``. Its value is canonical JSON: ``{"record": {...}, "sha256": <of the canonical record>}``, and the record
holds the kind, the version, the versions of the tools that wrote it, the document, and the SHA-256 of each array (dtype
and shape included).

The document is plain JSON, where NaN and infinity are refused. Arrays may hold NaN and infinity: whether they mean
anything is for the owner of the record to check.
"""

import hashlib
import json
import platform
import struct
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, JsonValue
from safetensors import SafetensorError, safe_open

from qdm_deploy.artifacts.files import canonical_json, new_file, plain_json
from qdm_deploy.errors import InputError

__all__ = ["installed_version", "read_record", "tool_versions", "write_record"]

_KEY = "qdm_record"
# numpy's portable name of a dtype -> the name that safetensors gives it.
_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    kind: str
    version: int = Field(ge=1)
    tools: dict[str, str]
    document: dict[str, JsonValue]
    arrays: dict[str, str]


def installed_version() -> str | None:
    """The version of the installed qdm-deploy, or None when its source runs without being installed."""
    try:
        return metadata.version("qdm-deploy")
    except metadata.PackageNotFoundError:
        return None


def tool_versions() -> dict[str, str]:
    """Versions of Python, qdm-deploy and of those numerical libraries that this process has loaded."""
    versions = {"python": platform.python_version(), "qdm-deploy": installed_version() or "not installed"}
    for name in ("numpy", "torch", "diffusers", "onnx", "onnxruntime"):
        version = getattr(sys.modules.get(name), "__version__", None)
        if version is not None:
            versions[name] = str(version)
    return versions


def write_record(
    path: Path,
    *,
    kind: str,
    version: int,
    document: Mapping[str, object],
    arrays: Mapping[str, NDArray[Any]],
) -> None:
    """Write one saved value; a file of that name is replaced when the new one is complete.

    Equal values written by equal tools give equal bytes.

    Args:
        path: The ``.safetensors`` file to write.
        kind: What the value is, for example "statistics".
        version: Version of this kind's document and arrays, 1 or more.
        document: Plain JSON; comes back with lists in place of tuples.
        arrays: Boolean, integer or floating point arrays (16 to 64 bits for floats) of any shape, also empty.

    Raises:
        ValueError: The document is not plain JSON, an array has another dtype or the reserved name ``__metadata__``.
        InputError, EnvironmentProblem, ResourceProblem: As ``new_file``.
    """
    plain = {name: _little_endian(name, array) for name, array in arrays.items()}
    record = _Record(
        kind=kind,
        version=version,
        tools=tool_versions(),
        document=plain_json(document, where="document"),  # type: ignore[arg-type]  # a mapping gives a dict
        arrays={name: _digest(array) for name, array in plain.items()},
    ).model_dump()
    envelope = {"record": record, "sha256": hashlib.sha256(canonical_json(record)).hexdigest()}
    # Widest items first keeps every array aligned in the file, as safetensors readers like it.
    order = sorted(plain, key=lambda name: (-plain[name].itemsize, name))
    header: dict[str, object] = {"__metadata__": {_KEY: canonical_json(envelope).decode()}}
    offset = 0
    for name in order:
        array = plain[name]
        end = offset + array.nbytes
        header[name] = {"dtype": _DTYPES[array.dtype.name], "shape": array.shape, "data_offsets": (offset, end)}
        offset = end
    text = canonical_json(header)
    text += b" " * (-len(text) % 8)
    # Written here and not with safetensors.numpy.save_file: the library hides a full disk behind its own error.
    with new_file(path) as temporary, open(temporary, "wb") as stream:
        stream.write(struct.pack("<Q", len(text)))
        stream.write(text)
        for name in order:
            stream.write(_bytes(plain[name]))


def read_record(path: Path, *, kind: str, version: int) -> tuple[dict[str, object], dict[str, NDArray[Any]]]:
    """Read a value that ``write_record`` wrote.

    Returns:
        The document, and the arrays; both belong to the caller.

    Raises:
        InputError: The file is missing, truncated or changed, is no record, is of another kind, or of another version
            (older ones too: the stage that wrote it is run again).
    """
    try:
        with safe_open(path, framework="numpy") as file:
            record = _checked_envelope(path, (file.metadata() or {}).get(_KEY))
            if record.kind != kind:
                raise InputError(f"{path} holds '{record.kind}', and '{kind}' is expected: give the right file")
            _refuse_version(path, kind, record.version, version)
            names = sorted(file.keys())
            if names != sorted(record.arrays):
                raise _damaged(path, f"it holds the arrays {names}, and {sorted(record.arrays)} are expected")
            arrays: dict[str, NDArray[Any]] = {}
            for name in names:
                array = file.get_tensor(name)
                if _digest(array) != record.arrays[name]:
                    raise _damaged(path, f"the array '{name}' differs from its SHA-256")
                arrays[name] = array
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise _damaged(path, f"not a complete safetensors file: {error}") from error
    return dict(record.document), arrays


def _checked_envelope(path: Path, text: str | None) -> _Record:
    if text is None:
        raise InputError(f"{path} is not a file that qdm-deploy wrote: its metadata has no '{_KEY}'")
    try:
        envelope = json.loads(text)
        record = _Record.model_validate(envelope["record"])
        intact = envelope["sha256"] == hashlib.sha256(canonical_json(envelope["record"])).hexdigest()
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise _damaged(path, f"its metadata '{_KEY}' is not a record: {type(error).__name__}: {error}") from error
    if not intact:
        raise _damaged(path, f"its metadata '{_KEY}' differs from its SHA-256")
    return record


def _refuse_version(path: Path, kind: str, found: int, expected: int) -> None:
    if found > expected:
        raise InputError(
            f"{path} is version {found} of '{kind}', and this qdm-deploy reads version {expected}: update qdm-deploy"
        )
    if found < expected:
        raise InputError(
            f"{path} is version {found} of '{kind}', and this qdm-deploy reads version {expected}: make it again"
        )


def _damaged(path: Path, cause: str) -> InputError:
    return InputError(f"{path} is damaged ({cause}): copy it again, or make it again")


def _little_endian(name: str, array: NDArray[Any]) -> NDArray[Any]:
    if name == "__metadata__":
        raise ValueError("the array name '__metadata__' is reserved by safetensors: use another one")
    if array.dtype.name not in _DTYPES:
        raise ValueError(f"the array '{name}' is {array.dtype}; allowed: {', '.join(_DTYPES)}")
    return np.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C")


def _bytes(array: NDArray[Any]) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _digest(array: NDArray[Any]) -> str:
    digest = hashlib.sha256(canonical_json([array.dtype.name, array.shape]))
    digest.update(_bytes(array))
    return digest.hexdigest()
