"""OpenVINO's compiled graphs on this machine's disk: a second process need not compile them again.

OpenVINO has a cache of its own, which loads a file with a flipped byte and computes something else. Here every file
begins with the hash of the rest, and one that does not fit it is compiled anew. A cache that cannot be used (read-only,
full, writable by others) costs time and nothing else, so it is never an error.
"""

import contextlib
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qdm_deploy.artifacts.cache_folder import cache_folder, trust_problem
from qdm_deploy.artifacts.files import canonical_json, new_file
from qdm_deploy.engines.cache_limit import over_limit
from qdm_deploy.errors import QdmError

__all__ = ["CompiledGraphs"]

_DIGEST_BYTES = 32
_SUFFIX = ".compiled"
# About the size of the weights for each batch size: room for some dozen models, or one or two of a billion parameters.
_MAX_BYTES = 8 * 1000**3


@dataclass(frozen=True)
class _Entry:
    path: Path
    disk_bytes: int
    last_used: float


class CompiledGraphs:
    """The compiled forms of one graph, by number of rows and of streams.

    Args:
        identity: what they depend on beside these (JSON values): graph and weights, library, machine, options.
        root: the folder; None takes ``$QDM_CACHE_DIR/openvino``, else ``qdm-deploy/openvino`` in ``$XDG_CACHE_HOME``.
        max_bytes: what the folder may hold; after a write the least recently used files beyond it go.
    """

    def __init__(
        self, identity: Mapping[str, object], root: Path | None = None, *, max_bytes: int = _MAX_BYTES
    ) -> None:
        self._identity = dict(identity)
        self._max_bytes = max_bytes
        self._root = _usable(root)

    def load(self, rows: int, streams: int) -> bytes | None:
        """What ``store`` was given for that many rows and streams; None where there is nothing, or nothing intact."""
        path = self._path(rows, streams)
        if path is None:
            return None
        with contextlib.suppress(OSError):
            with path.open("rb") as stream:
                digest, blob = stream.read(_DIGEST_BYTES), stream.read()
            if hashlib.sha256(blob).digest() == digest:
                os.utime(path)
                return blob
            path.unlink()
        return None

    def store(self, rows: int, streams: int, blob: bytes) -> None:
        """Keep a compiled graph; where that is impossible, nothing happens."""
        path = self._path(rows, streams)
        if path is None:
            return
        with contextlib.suppress(OSError, QdmError):
            with new_file(path) as staged, staged.open("wb") as stream:
                stream.write(hashlib.sha256(blob).digest())
                stream.write(blob)
            self._prune(path)

    def _path(self, rows: int, streams: int) -> Path | None:
        if self._root is None:
            return None
        name = hashlib.sha256(
            canonical_json({"format": 2, "rows": rows, "streams": streams, **self._identity})
        ).hexdigest()
        return self._root / f"{name}{_SUFFIX}"

    def _prune(self, kept: Path) -> None:
        entries = []
        for path in kept.parent.glob(f"*{_SUFFIX}"):
            with contextlib.suppress(FileNotFoundError):  # another process removed it meanwhile
                status = path.stat()
                entries.append(_Entry(path, status.st_size, status.st_mtime))
        for entry in over_limit(entries, self._max_bytes):
            if entry.path != kept:
                entry.path.unlink(missing_ok=True)


def _usable(root: Path | None) -> Path | None:
    try:
        folder = (root or cache_folder("openvino")).expanduser().absolute()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return None if trust_problem(folder) else folder
    except (OSError, QdmError):
        return None
