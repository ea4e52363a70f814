"""A bundle: the folder that a deployment is shipped as.

The manifest lists every file. Opening a bundle proves that the folder holds those files and nothing else: no missing,
extra or changed byte, no link, no special file, no path that leaves the folder. ``check="sizes"`` leaves out the
hashing, for a fast start on a bundle that was verified when it was installed.

A bundle is opened from its real path, so replacing a link that leads to it does not mix two bundles. A folder that is
changed after it was opened is not noticed.
"""

import json
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Literal, Self

from pydantic import ValidationError

from qdm_deploy.artifacts.files import (
    StagedDirectory,
    open_plain_file,
    plain_json,
    raise_if_full,
    sha256_of_stream,
    special_file_problem,
)
from qdm_deploy.artifacts.manifest import (
    MANIFEST_NAME,
    SCHEMA_VERSION,
    Compatibility,
    FileEntry,
    Manifest,
    first_problem,
    read_manifest,
    relative_path_problem,
    role_of,
)
from qdm_deploy.artifacts.pipeline_spec import PipelineSpec
from qdm_deploy.artifacts.record import installed_version
from qdm_deploy.errors import BundleError, ResourceProblem

__all__ = ["Bundle", "BundleWriter", "check_bundle"]

_SCHEDULER_CONFIG = "scheduler/scheduler_config.json"
_AGAIN = "build it again with `qdm-deploy build`, or copy it again"


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its real path and its manifest, checked against each other."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path, *, check: Literal["full", "sizes"] = "full") -> Self:
        """Check a bundle and open it.

        Args:
            path: The bundle's folder, or a link to it.
            check: "full" hashes every file; "sizes" compares names, kinds and sizes only.

        Raises:
            BundleError: The first thing found wrong; ``check_bundle`` lists all.
        """
        root = Path(os.path.realpath(path))
        manifest = read_manifest(root)
        for advice in _too_old(manifest):
            raise BundleError(f"{root} cannot be used: {advice}")
        for finding in _findings(root, manifest, hashes=check == "full"):
            raise BundleError(f"{root} is not intact: {finding}. See all with `qdm-deploy verify`; {_AGAIN}")
        return cls(root, manifest)

    @property
    def id(self) -> str:
        """SHA-256 of the canonical manifest: names this exact bundle."""
        return self.manifest.bundle_id

    @property
    def pipeline(self) -> PipelineSpec:
        """The model: its components, and how they fit together."""
        return self.manifest.pipeline

    def file(self, relative: str) -> Path:
        """Path of a listed file.

        Raises:
            BundleError: The manifest does not list it.
        """
        if all(entry.path != relative for entry in self.manifest.files):
            listed = ", ".join(entry.path for entry in self.manifest.files)
            raise BundleError(f"{self.path} has no file {relative!a}; it has: {listed}")
        return self.path / relative

    def graph(self, target: str) -> Path:
        """Path of the step graph for a target, ``unet/TARGET.onnx``; "float" is the unquantized one.

        Raises:
            BundleError: The bundle was built without it.
        """
        if not self.has_graph(target):
            there = ", ".join(self._graphs())
            raise BundleError(f"{self.path} has no graph for {target!a}; it has: {there}. Build it with that target")
        return self.path / "unet" / f"{target}.onnx"

    def has_graph(self, target: str) -> bool:
        """Whether ``graph`` would find one."""
        return target in self._graphs()

    def _graphs(self) -> list[str]:
        graphs = [PurePosixPath(entry.path) for entry in self.manifest.files if entry.role == "graph"]
        return [graph.stem for graph in graphs if graph.parent == PurePosixPath("unet")]

    def scheduler_config(self) -> dict[str, object]:
        """The diffusers scheduler configuration that the model was trained with.

        Raises:
            BundleError: The file is not listed or is not a JSON object.
        """
        path = self.file(_SCHEDULER_CONFIG)
        try:
            with open_plain_file(path) as stream:
                config = json.loads(stream.read().decode("utf-8"))
        except OSError as error:
            raise BundleError(f"{path} cannot be read ({error.strerror}): {_AGAIN}") from error
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{path} is not JSON ({error}): {_AGAIN}") from error
        if not isinstance(config, dict):
            raise BundleError(f"{path} holds a {type(config).__name__}, and an object is expected: {_AGAIN}")
        return config


def check_bundle(path: Path) -> list[str]:
    """Everything that is wrong with a bundle, hashes included; an empty list means that it is intact."""
    root = Path(os.path.realpath(path))
    try:
        manifest = read_manifest(root)
    except BundleError as error:
        return [str(error)]
    return [*_too_old(manifest), *_findings(root, manifest, hashes=True)]


def _findings(root: Path, manifest: Manifest, *, hashes: bool) -> Iterator[str]:
    """One sentence per problem, the cheap ones first."""
    listed = {entry.path: entry for entry in manifest.files}
    folders = {str(parent) for path in listed for parent in PurePosixPath(path).parents}
    present: list[FileEntry] = []
    seen: set[str] = set()
    for relative, found in _walk(root, folders):
        seen.add(relative)
        entry = listed.get(relative)
        if isinstance(found, str):
            yield f"{relative!a} {found}"
        elif entry is None:
            if relative != MANIFEST_NAME:
                yield f"{relative!a} is not listed in {MANIFEST_NAME}; expected: no other file"
        elif found.st_size != entry.size:
            yield f"{relative} has {found.st_size} bytes, and {entry.size} are expected"
        else:
            present.append(entry)
    for relative in sorted(listed.keys() - seen):
        yield f"{relative} is missing, and {listed[relative].size} bytes are expected"
    if hashes:
        for entry in present:
            yield from _wrong_hash(root, entry)


def _walk(root: Path, folders: set[str] | None) -> Iterator[tuple[str, os.stat_result | str]]:
    """Every file below ``root`` with its status, or with why it may not be there.

    Descends into ``folders`` only (None: into all), so that a stray folder is one finding, however much it holds.
    """
    pending = [""]
    while pending:
        prefix = pending.pop()
        try:
            with os.scandir(root / prefix) as scan:
                entries = sorted((item.name, item.stat(follow_symlinks=False)) for item in scan)
        except OSError as error:
            yield prefix, f"cannot be read ({error.strerror})"
            continue
        for name, status in entries:
            relative = prefix + name
            if not stat.S_ISDIR(status.st_mode):
                yield relative, special_file_problem(status) or status
            elif folders is None or relative in folders:
                pending.append(f"{relative}/")
            else:
                yield relative, f"is a folder that {MANIFEST_NAME} does not know; expected: no other folder"


def _wrong_hash(root: Path, entry: FileEntry) -> Iterator[str]:
    try:
        with open_plain_file(root / entry.path) as stream:
            found = sha256_of_stream(stream)
    except OSError as error:
        yield f"{entry.path} cannot be read ({error.strerror})"
        return
    if found != entry.sha256:
        yield f"{entry.path} has SHA-256 {found}, and {entry.sha256} is expected"


def _too_old(manifest: Manifest) -> Iterator[str]:
    installed, min_runtime = installed_version(), manifest.compatibility.min_runtime
    if installed is not None and _release(installed) < _release(min_runtime):
        yield f"it needs qdm-deploy {min_runtime} or newer, and this is {installed}: update qdm-deploy"


def _release(version: str) -> tuple[int, ...]:
    # "0.2.0rc1" counts as 0.2, and 0.2 equals 0.2.0.
    digits = re.match(r"\d+(?:\.\d+)*", version)
    parts = [int(part) for part in digits[0].split(".")] if digits else []
    while parts and parts[-1] == 0:
        parts.pop()
    return tuple(parts)


class BundleWriter:
    """Writes a bundle: fill ``root`` inside the ``with`` block, then call ``publish`` once.

    The bundle takes its name when the block ends. Without ``publish``, or with an error, nothing is left.

    Args:
        out: The bundle's folder; missing parents are made.
        force: Replace what is there if it is an empty folder, or a bundle whose manifest is intact and which holds no
            file of somebody else's.

    Raises:
        InputError: On entry, when ``out`` exists and may not be replaced.
        EnvironmentProblem: On entry, when the place cannot be written.
        ResourceProblem: The disk is full.
    """

    def __init__(self, out: Path, *, force: bool = False) -> None:
        self._out = out
        self._force = force
        self._stage: StagedDirectory | None = None
        self._manifest: Manifest | None = None

    @property
    def root(self) -> Path:
        """The temporary folder to write into; exists inside the ``with`` block only."""
        return self._entered().root

    def _entered(self) -> StagedDirectory:
        if self._stage is None:
            raise ValueError("BundleWriter.root exists inside its `with` block only: enter it first")
        return self._stage

    def __enter__(self) -> Self:
        self._stage = StagedDirectory(self._out, force=self._force, may_replace=_why_kept)
        return self

    def publish(
        self,
        *,
        name: str,
        pipeline: PipelineSpec,
        targets: Sequence[str],
        compatibility: Compatibility,
        provenance: Mapping[str, object],
        recipe: Mapping[str, object],
        created: datetime | None = None,
    ) -> Manifest:
        """List, hash and seal what is in ``root``: writes the manifest, after which no file may change.

        Args:
            name: What people call the model.
            pipeline: What it is made of, and how that fits together.
            targets: Targets with a graph ``unet/TARGET.onnx``.
            compatibility: What running it needs.
            provenance: Plain JSON: where the model came from.
            recipe: Plain JSON: how it was quantized.
            created: The time to record; now when left out. Must know its time zone.

        Returns:
            The manifest, which knows the bundle's id.

        Raises:
            BundleError: A file may not be in a bundle, or the values do not fit together.
            ValueError: Published already, or ``provenance`` or ``recipe`` is not plain JSON.
        """
        if self._manifest is not None:
            raise ValueError("publish was called already: one BundleWriter writes one bundle")
        root = self.root
        document = {
            "schema_version": SCHEMA_VERSION,
            "name": name,
            "created": (created or datetime.now(UTC)).astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            # Dumped so that the manifest spells out every default.
            "pipeline": pipeline.model_dump(),
            "targets": tuple(targets),
            "files": _list_files(root),
            "compatibility": compatibility.model_dump(),
            "provenance": plain_json(provenance, where="provenance"),
            "recipe": plain_json(recipe, where="recipe"),
        }
        try:
            manifest = Manifest.model_validate(document)
        except ValidationError as error:
            raise BundleError(f"{self._out} cannot be published, {first_problem(error)}") from error
        for finding in _findings(root, manifest, hashes=False):
            raise BundleError(f"{self._out} cannot be published: {finding}")
        (root / MANIFEST_NAME).write_bytes(manifest.to_bytes())
        self._manifest = manifest
        return manifest

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        stage, self._stage = self._entered(), None
        if error is not None or self._manifest is None:
            stage.discard(error)
            if isinstance(error, ResourceProblem) and str(stage.root) in str(error):
                # Say it of the bundle: the user never sees the folder it was written in.
                raise ResourceProblem(str(error).replace(str(stage.root), str(stage.final))) from error
            if error is not None:
                raise_if_full(stage.final, error)
            return
        try:
            _refuse_late_changes(stage.root, self._manifest)
            stage.commit()
        except BaseException as failure:
            stage.discard(failure)
            raise


def _refuse_late_changes(root: Path, manifest: Manifest) -> None:
    for finding in _findings(root, manifest, hashes=False):
        raise BundleError(f"the bundle was changed after publish: {finding}. Call publish last")


def _list_files(root: Path) -> list[FileEntry]:
    entries: list[FileEntry] = []
    for relative, found in sorted(_walk(root, None), key=lambda item: item[0]):
        problem = found if isinstance(found, str) else relative_path_problem(relative)
        if isinstance(found, str) or problem is not None:
            raise BundleError(f"{relative!a} cannot go into a bundle: it {problem}")
        with open_plain_file(root / relative) as stream:
            digest = sha256_of_stream(stream)
        entries.append(FileEntry(path=relative, size=found.st_size, sha256=digest, role=role_of(relative)))
    return entries


def _why_kept(folder: Path) -> str | None:
    """Why ``force`` may not replace a folder: it replaces what is provably a bundle and nothing but a bundle."""
    if not any(folder.iterdir()):
        return None
    try:
        manifest = read_manifest(folder)
    except BundleError as error:
        return f"is not a bundle that can be recognised ({error})"
    listed = {entry.path for entry in manifest.files} | {MANIFEST_NAME}
    folders = {str(parent) for path in listed for parent in PurePosixPath(path).parents}
    for relative, _ in _walk(folder, folders):
        if relative not in listed:
            return f"holds {relative!a}, which is not part of the bundle"
    return None
