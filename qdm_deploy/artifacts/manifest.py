"""The manifest of a bundle: what it is, what it needs, and every file with its size and SHA-256.

``manifest.json`` is the manifest as indented JSON with sorted keys, plus ``bundle_id``: the SHA-256 of the same JSON
without it, in canonical form. The file must be, byte for byte, what this module writes, so a change to the manifest
itself is noticed as well. That finds damage, not forgery: whoever can write the folder can also write a new manifest.

Versions are MAJOR.MINOR. Another major version is refused. A newer minor version is read as long as it has only the
fields known here; unknown fields are refused, never ignored.
"""

import hashlib
import json
import re
import reprlib
from datetime import datetime, timedelta
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, NoReturn, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, field_validator, model_validator

from qdm_deploy.artifacts.files import canonical_json, open_plain_file, plain_json
from qdm_deploy.artifacts.pipeline_spec import PipelineSpec
from qdm_deploy.errors import BundleError

__all__ = [
    "MANIFEST_NAME",
    "SCHEMA_VERSION",
    "Compatibility",
    "FileEntry",
    "Manifest",
    "first_problem",
    "read_manifest",
    "relative_path_problem",
    "role_of",
]

MANIFEST_NAME = "manifest.json"
SCHEMA_VERSION = "2.0"
MAX_MANIFEST_BYTES = 4 << 20
_MAJOR, _MINOR = (int(part) for part in SCHEMA_VERSION.split("."))
_MAX_PATH_LENGTH = 200
# Data only, nothing that a loader would execute: a TensorRT engine is native code, .pt, .pth and .ckpt are pickles.
_SUFFIXES = (".bin", ".data", ".html", ".json", ".md", ".onnx", ".png", ".safetensors", ".txt")
_PLAIN_NAMES = ("LICENSE", "NOTICE")
_AGAIN = "build it again with `qdm-deploy build`, or copy it again"

Version = Annotated[str, Field(pattern=r"^\d+(\.\d+)*$", max_length=40)]
Target = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=40)]


def relative_path_problem(path: str) -> str | None:
    """Why a path may not stand in a bundle, or None.

    Allowed are folders and a file name of letters, digits, ``.``, ``_`` and ``-``, joined by ``/``: one spelling on
    every file system (ASCII is its own NFC form). No part ends in a dot, which rules out ``..`` and names that Windows
    shortens.
    """
    if len(path) > _MAX_PATH_LENGTH:
        return f"has {len(path)} characters; allowed: {_MAX_PATH_LENGTH}"
    for part in path.split("/"):
        if not re.fullmatch(r"[A-Za-z0-9._-]*[A-Za-z0-9_-]", part):
            return f"has the part {part!a}; allowed: letters, digits, '.', '_', '-', not empty, no '.' at the end"
    name = PurePosixPath(path)
    if name.suffix not in _SUFFIXES and name.name not in _PLAIN_NAMES:
        return (
            f"is no kind of file that belongs in a bundle; allowed: *{', *'.join(_SUFFIXES)}, {', '.join(_PLAIN_NAMES)}"
        )
    return None


def role_of(path: str) -> str:
    """What a file of a bundle is for, from its place: graph, weights, plan, scheduler, selftest, report or other."""
    name = PurePosixPath(path)
    if name.suffix == ".onnx":
        return "graph"
    if name.suffix in (".bin", ".data"):
        return "weights"
    if name.stem in ("plan", "report"):
        return name.stem
    folder = name.parts[0]
    return folder if folder in ("scheduler", "selftest", "tokenizer") else "other"


class FileEntry(BaseModel):
    """One file: where, how many bytes, their SHA-256, and what it is for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    size: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    role: str = Field(pattern=r"^[a-z][a-z0-9_-]*$", max_length=40)

    @field_validator("path")
    @classmethod
    def _stays_inside(cls, path: str) -> str:
        problem = relative_path_problem(path)
        if problem is not None:
            raise ValueError(f"the path {path!a} {problem}")
        return path


class Compatibility(BaseModel):
    """What running the bundle needs: the ONNX opset of its graphs and the oldest qdm-deploy version that runs them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    opset: int = Field(ge=1)
    min_runtime: Version


class Manifest(BaseModel):
    """A bundle's manifest; its fields are checked against each other.

    ``created`` is UTC, as ``2026-01-31T12:00:00Z``. ``provenance`` (where the model came from) and ``recipe`` (how it
    was quantized) are plain JSON that no runtime depends on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: str = Field(pattern=rf"^{_MAJOR}\.\d{{1,6}}$")
    name: str = Field(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]+$")
    created: str
    pipeline: PipelineSpec
    targets: tuple[Target, ...] = Field(min_length=1)
    files: tuple[FileEntry, ...]
    compatibility: Compatibility
    provenance: dict[str, JsonValue]
    recipe: dict[str, JsonValue]

    @field_validator("created")
    @classmethod
    def _is_utc(cls, created: str) -> str:
        moment = datetime.fromisoformat(created)
        if moment.utcoffset() != timedelta(0) or not created.endswith("Z"):
            raise ValueError(f"{created!a} is not a UTC time; allowed: 2026-01-31T12:00:00Z")
        return created

    @model_validator(mode="after")
    def _files_are_distinct(self) -> Self:
        spellings: dict[str, str] = {MANIFEST_NAME: MANIFEST_NAME}
        seen = {MANIFEST_NAME}
        for entry in self.files:
            if entry.path in seen:
                raise ValueError(f"the file {entry.path} is listed twice, or is the manifest itself")
            seen.add(entry.path)
            # Folders too: "Unet/a" and "unet/b" share a folder on some file systems.
            for place in (entry.path, *map(str, PurePosixPath(entry.path).parents)):
                other = spellings.setdefault(place.casefold(), place)
                if other != place:
                    raise ValueError(f"{place} and {other} differ in upper and lower case only")
        missing = [target for target in self.targets if f"unet/{target}.onnx" not in seen]
        if missing or len(set(self.targets)) != len(self.targets):
            raise ValueError(f"targets {list(self.targets)}: each needs one unet/TARGET.onnx; missing: {missing}")
        return self

    @property
    def bundle_id(self) -> str:
        """SHA-256 of the manifest in canonical JSON: 64 hex digits that name this exact bundle."""
        return hashlib.sha256(canonical_json(self._document())).hexdigest()

    def to_bytes(self) -> bytes:
        """The content of ``manifest.json``: UTF-8, sorted keys, two spaces, one newline at the end."""
        return _file_content({**self._document(), "bundle_id": self.bundle_id})

    def _document(self) -> dict[str, Any]:
        # Fields that were not given are left out: a default that a later version adds must not change the id of a
        # bundle that was written before.
        return self.model_dump(mode="json", exclude_unset=True)

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """Parse and check the content of ``manifest.json``.

        Raises:
            ValueError: Says what is wrong; the caller knows the file's name.
        """
        try:
            document = json.loads(content.decode("utf-8"), parse_constant=_refuse_constant)
        except RecursionError as error:
            raise ValueError("it is nested too deeply") from error
        except ValueError as error:
            raise ValueError(f"it is not JSON: {error}") from error
        if not isinstance(document, dict):
            raise ValueError(f"it holds a {type(document).__name__}, and an object is expected")
        newer_minor = _refuse_other_major(document.get("schema_version"))
        recorded = document.pop("bundle_id", None)
        try:
            manifest = cls.model_validate_json(canonical_json(document), strict=True)
        except ValidationError as error:
            advice = f" (its schema {document['schema_version']} is newer: update qdm-deploy)" if newer_minor else ""
            raise ValueError(first_problem(error) + advice) from error
        if recorded != manifest.bundle_id:
            raise ValueError(
                f"it was changed after it was written: its bundle_id is {recorded!a}, and its content gives"
                f" {manifest.bundle_id}"
            )
        if content != manifest.to_bytes():
            raise ValueError("it was reformatted or edited after it was written")
        return manifest


def _file_content(document: dict[str, Any]) -> bytes:
    text = json.dumps(plain_json(document, where="manifest"), sort_keys=True, indent=2, ensure_ascii=False)
    return text.encode("utf-8") + b"\n"


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _refuse_other_major(version: object) -> bool:
    """Whether the version is a newer minor one; raises ValueError when its major number is another."""
    match = re.fullmatch(r"(\d{1,6})\.(\d{1,6})", version) if isinstance(version, str) else None
    if match is None:
        raise ValueError(f"its schema_version is {version!a}, and MAJOR.MINOR such as '{SCHEMA_VERSION}' is expected")
    major, minor = int(match[1]), int(match[2])
    if major != _MAJOR:
        advice = "update qdm-deploy" if major > _MAJOR else "build it again with `qdm-deploy build`"
        raise ValueError(f"its schema is {version}, and this qdm-deploy reads {_MAJOR}.x: {advice}")
    return minor > _MINOR


def first_problem(error: ValidationError) -> str:
    """The first thing that pydantic found, with its place and the value, cut to one line."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    cause = first.get("ctx", {}).get("error")  # our own ValueError, whose text says it all
    text = str(cause) if cause is not None else f"{first['msg']}, given {reprlib.repr(first['input'])}"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{place}: {text}{more}" if place else f"{text}{more}"


def read_manifest(folder: Path) -> Manifest:
    """Read and check ``manifest.json`` of a bundle's folder.

    Raises:
        BundleError: The folder or its manifest is missing, or the manifest is a link, too large, damaged or of another
            version.
    """
    path = folder / MANIFEST_NAME
    if not folder.is_dir():
        raise BundleError(f"{folder} is not a folder; give the folder of a bundle, made with `qdm-deploy build`")
    try:
        with open_plain_file(path) as stream:
            content = b""
            while len(content) <= MAX_MANIFEST_BYTES and (chunk := stream.read(MAX_MANIFEST_BYTES + 1 - len(content))):
                content += chunk
    except FileNotFoundError as error:
        raise BundleError(
            f"{folder} has no {MANIFEST_NAME}: it is not a bundle, or was not copied completely; {_AGAIN}"
        ) from error
    except OSError as error:
        raise BundleError(f"{path} cannot be read ({error.strerror}): {_AGAIN}") from error
    if len(content) > MAX_MANIFEST_BYTES:
        raise BundleError(f"{path} is larger than the allowed {MAX_MANIFEST_BYTES} bytes: {_AGAIN}")
    try:
        return Manifest.from_bytes(content)
    except ValueError as error:
        raise BundleError(f"{path} cannot be used, {error}: {_AGAIN}") from error
