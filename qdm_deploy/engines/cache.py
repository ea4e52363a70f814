"""Engines built once per machine and kept outside the bundle.

A plan is native code for one library version and one GPU, so it is never shipped: it is built here and kept in a folder
only its owner can write. One folder per key holds ``engine.plan``, ``log.txt``, ``audit.json`` and ``meta.json``; it
appears under its final name only when complete, one process builds while others wait on a lock file, and a folder whose
files do not match the hashes in ``meta.json`` is built again, never loaded. The time of ``meta.json`` is that of the
engine's last use; when the cache grows beyond its limit, the engines that were not used for longest go.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from qdm_deploy.artifacts.cache_folder import cache_folder, trust_problem
from qdm_deploy.artifacts.files import canonical_json, new_directory, sha256_of
from qdm_deploy.engines.cache_limit import cache_limit, over_limit
from qdm_deploy.engines.request import BatchProfile, BuildOptions
from qdm_deploy.errors import EnvironmentProblem
from qdm_deploy.progress import SILENT, Progress

__all__ = ["CachedEngine", "EngineCache", "EngineIdentity", "EngineMeta"]

_FILES = ("engine.plan", "log.txt", "audit.json")
_META = "meta.json"
_KEY = re.compile("[0-9a-f]{64}")


class EngineIdentity(BaseModel):
    """Everything an engine depends on; equal identities may share an engine.

    Attributes:
        graph_sha256: Hash of the ONNX file.
        data_sha256: Hash of every external data file, by file name.
        backend: "tensorrt" or "tensorrt-rtx".
        library_version: Version of the Python module that built it; plans are not portable between versions.
        target: Compute capability, or GPU name, capability and driver.
        profile: Batch sizes.
        options: Builder options.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    graph_sha256: str
    data_sha256: dict[str, str]
    backend: str
    library_version: str
    target: str
    profile: BatchProfile
    options: BuildOptions

    @property
    def key(self) -> str:
        """SHA-256 of the identity, 64 hex digits: the folder's name in the cache."""
        document = {"format": 2, **self.model_dump(mode="json")}
        return hashlib.sha256(canonical_json(document)).hexdigest()


class EngineMeta(BaseModel):
    """``meta.json``: what the engine was built from, when, how long it took, and the hash of every file beside it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    identity: EngineIdentity
    graph: str
    created: datetime
    build_seconds: float
    sha256: dict[str, str]


@dataclass(frozen=True)
class CachedEngine:
    """One folder of the cache.

    Attributes:
        key: Its name.
        path: The folder.
        size_bytes: Size of the plan.
        disk_bytes: Size of all its files.
        last_used: When it was built or found last, in seconds since the epoch.
        meta: What it says of itself; None when that cannot be read.
        problem: Why it will be built again, or None.
    """

    key: str
    path: Path
    size_bytes: int
    disk_bytes: int
    last_used: float
    meta: EngineMeta | None
    problem: str | None


class EngineCache:
    """The folder of engines.

    Args:
        root: The folder; None takes ``$QDM_CACHE_DIR/engines``, else ``qdm-deploy/engines`` in ``$XDG_CACHE_HOME`` (by
            default ``~/.cache``).
        max_bytes: What its engines may take on disk; after a build the least recently used ones beyond it are removed.
            None takes ``$QDM_ENGINE_CACHE_LIMIT``, else 20 GB. The engine just built stays, however large.

    Raises:
        InputError: The environment's limit is not a size.
    """

    def __init__(self, root: Path | None = None, *, max_bytes: int | None = None) -> None:
        self.root = (root or cache_folder("engines")).expanduser().absolute()
        self.max_bytes = cache_limit() if max_bytes is None else max_bytes

    def entry(
        self,
        identity: EngineIdentity,
        graph: Path,
        build: Callable[[Path], float],
        *,
        progress: Progress = SILENT,
    ) -> tuple[Path, EngineMeta, bool]:
        """The complete folder of an engine, built if there is none that can be trusted.

        Args:
            identity: What is wanted.
            graph: The ONNX file, named in ``meta.json`` for people.
            build: Writes ``engine.plan``, ``log.txt`` and ``audit.json`` into an empty folder and returns the seconds
                it took. On an error what it left of ``log.txt`` is kept at ``failure_log(key)``.
            progress: Told when another process is building, or when an entry is damaged.

        Returns:
            The folder, its meta data, and whether it was there already.

        Raises:
            EnvironmentProblem: The cache cannot be written, or others could write to it.
            ResourceProblem: The disk is full.
        """
        self.prepare()
        key = identity.key
        folder = self.root / key
        with self._locked(key, progress):
            if folder.exists():
                found = self._read(folder, check_hashes=True)
                if found.meta is not None and found.problem is None and found.meta.identity == identity:
                    os.utime(folder / _META)
                    return folder, found.meta, True
                progress.say(f"the cached engine {key[:12]} is not usable ({found.problem}) and is built again")
                shutil.rmtree(folder)
            self._clean_up(key)
            meta = self._built(identity, graph, build)
        for gone in self.prune(keep=key):
            progress.say(f"the engine cache is over its limit; removed {gone.key[:12]}, used longest ago")
        return folder, meta, False

    def prune(self, max_bytes: int | None = None, *, keep: str | None = None) -> tuple[CachedEngine, ...]:
        """Remove damaged engines, then the least recently used ones, until the rest takes ``max_bytes`` or less.

        What killed builds left goes first. An engine that a process is building or reading at this moment is left
        alone.

        Args:
            max_bytes: None takes the cache's own limit; 0 removes every engine.
            keep: Key of an engine that stays in any case; its size counts.

        Returns:
            What was removed.
        """
        self._sweep()
        entries = self.list_engines()
        damaged = [entry for entry in entries if entry.problem is not None]
        sound = [entry for entry in entries if entry.problem is None and entry.key != keep]
        kept = sum(entry.disk_bytes for entry in entries if entry.problem is None and entry.key == keep)
        limit = self.max_bytes if max_bytes is None else max_bytes
        doomed = [*damaged, *over_limit(sound, max(limit - kept, 0))]
        return tuple(entry for entry in doomed if self.remove(entry.key))

    def remove(self, key: str) -> bool:
        """Remove one engine; False when there is none, or a process is building or reading it at this moment."""
        self.prepare()
        with self._locked_now(key) as ours:
            if not ours:
                return False
            # Renamed first: nobody may find a folder of this key with some of its files gone.
            doomed = self.root / f".{key[:50]}.tmp-pruned"
            shutil.rmtree(doomed, ignore_errors=True)
            try:
                (self.root / key).rename(doomed)
            except FileNotFoundError:
                return False
            shutil.rmtree(doomed)
        return True

    def failure_log(self, key: str) -> Path:
        """Where the log of the last failed build of this key is kept."""
        return self.root / "failed" / f"{key}.txt"

    def timing_cache(self, identity: EngineIdentity) -> Path:
        """Where kernel timings of this library on this GPU are kept between builds."""
        self.prepare()
        name = hashlib.sha256(f"{identity.backend} {identity.library_version} {identity.target}".encode()).hexdigest()
        return self.root / "timing" / f"{name}.cache"

    def list_engines(self) -> tuple[CachedEngine, ...]:
        """Every engine in the cache, oldest first; damaged ones say so. Hashes are not computed."""
        if not self.root.is_dir():
            return ()
        # Not by length: the folder of a build under way has as many letters, and is no damaged engine.
        folders = (path for path in self.root.iterdir() if path.is_dir() and _KEY.fullmatch(path.name))
        engines = []
        for folder in folders:
            with contextlib.suppress(FileNotFoundError):  # another process removed it meanwhile
                engines.append(self._read(folder, check_hashes=False))
        return tuple(sorted(engines, key=lambda engine: (str(engine.meta and engine.meta.created), engine.key)))

    def _built(self, identity: EngineIdentity, graph: Path, build: Callable[[Path], float]) -> EngineMeta:
        with new_directory(self.root / identity.key) as folder:
            try:
                seconds = build(folder)
            except BaseException:
                self._keep_log(identity.key, folder / "log.txt")
                raise
            meta = EngineMeta(
                identity=identity,
                graph=str(graph),
                created=datetime.now(UTC),
                build_seconds=round(seconds, 3),
                sha256={name: sha256_of(folder / name) for name in _FILES},
            )
            (folder / _META).write_text(meta.model_dump_json(indent=1) + "\n", encoding="utf-8")
        self.failure_log(identity.key).unlink(missing_ok=True)
        return meta

    def _keep_log(self, key: str, log: Path) -> None:
        if log.exists():
            os.replace(log, self.failure_log(key))

    def _read(self, folder: Path, *, check_hashes: bool) -> CachedEngine:
        sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
        used = (folder / _META if _META in sizes else folder).stat().st_mtime
        facts = (folder.name, folder, sizes.get("engine.plan", 0), sum(sizes.values()), used)
        try:
            meta = EngineMeta.model_validate_json((folder / _META).read_bytes())
        except OSError as error:
            return CachedEngine(*facts, None, f"meta.json cannot be read: {error.strerror}")
        except ValidationError as error:
            return CachedEngine(*facts, None, f"meta.json is damaged: {error.errors()[0]['msg']}")
        problem = None if meta.identity.key == folder.name else "meta.json describes another engine"
        for name in _FILES:
            path = folder / name
            if not path.is_file() or path.is_symlink():
                problem = problem or f"{name} is missing"
            elif check_hashes and sha256_of(path) != meta.sha256.get(name):
                problem = problem or f"{name} was changed after it was built"
        return CachedEngine(*facts, meta, problem)

    def _sweep(self) -> None:
        """Remove what killed builds left of any engine: nobody may ask for that engine ever again."""
        for leftover in self.root.glob(".*.tmp-*"):
            self.prepare()
            start = leftover.name[1:].partition(".")[0]
            keys = [path.name for path in (self.root / "locks").glob(f"{start}*")]
            with contextlib.ExitStack() as locks:
                if all(locks.enter_context(self._locked_now(key)) for key in keys):
                    shutil.rmtree(leftover, ignore_errors=True)  # another process may be removing it too

    def _clean_up(self, key: str) -> None:
        # Left by a process that was killed; ours is the only one that may write under this key.
        for leftover in self.root.glob(f".{key[:50]}.tmp-*"):
            shutil.rmtree(leftover)

    @contextmanager
    def _locked_now(self, key: str) -> Iterator[bool]:
        """Hold a key's lock if no other process does; says whether that is so."""
        with (self.root / "locks" / key).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True

    @contextmanager
    def _locked(self, key: str, progress: Progress) -> Iterator[None]:
        # The lock file stays: removing it would let two processes hold locks on two files of one name.
        with (self.root / "locks" / key).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                progress.say("another process is building this engine; waiting for it")
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def prepare(self) -> None:
        """Make the folder, and refuse one that cannot be used or that others could put code into.

        Raises:
            EnvironmentProblem: With the fix.
        """
        try:
            for folder in (self.root, self.root / "locks", self.root / "failed", self.root / "timing"):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            writable = os.access(self.root, os.W_OK | os.X_OK)
        except OSError as error:
            raise EnvironmentProblem(
                f"the engine cache {self.root} cannot be made ({error.strerror}); set QDM_CACHE_DIR to a folder you "
                "can write to"
            ) from error
        if not writable:
            raise EnvironmentProblem(
                f"the engine cache {self.root} cannot be written; set QDM_CACHE_DIR to a folder you can write to"
            )
        problem = trust_problem(self.root)
        if problem is not None:
            raise EnvironmentProblem(
                f"the engine cache {self.root} {problem}: others could put their code into your engines; run chmod 700 "
                "on your own folder, or set QDM_CACHE_DIR to another one"
            )
