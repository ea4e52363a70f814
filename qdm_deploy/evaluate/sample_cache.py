"""Samples and their features, kept in small files: an interrupted evaluation goes on where it stopped."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from qdm_deploy.artifacts.cache_folder import cache_folder
from qdm_deploy.artifacts.files import canonical_json, new_file
from qdm_deploy.progress import SILENT, Progress

__all__ = ["CHUNK_IMAGES", "SampleCache", "chunks_of"]

CHUNK_IMAGES = 250

Tensors = dict[str, NDArray[Any]]


def chunks_of(count: int, size: int) -> Iterator[slice]:
    """[0, count) in pieces of ``size``; the last may be smaller."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


class SampleCache:
    """A folder of safetensors files, one folder in it per key.

    Args:
        identity: plain JSON that names everything the samples depend on.
        root: None takes ``$QDM_CACHE_DIR/evaluations``, else ``qdm-deploy/evaluations`` in ``$XDG_CACHE_HOME`` (by
            default ``~/.cache``).
    """

    def __init__(self, identity: Mapping[str, object], root: Path | None = None) -> None:
        key = hashlib.sha256(canonical_json({"format": 2, **identity})).hexdigest()
        self.folder = (root or cache_folder("evaluations")).expanduser().absolute() / key

    def tensors(
        self,
        name: str,
        rows: slice,
        shapes: Mapping[str, tuple[int, ...]],
        make: Callable[[], Tensors],
        progress: Progress = SILENT,
    ) -> Tensors:
        """The tensors of some rows, from the file if there is one, else made and kept.

        Args:
            name: what they are; part of the file's name.
            rows: which ones; part of the file's name too.
            shapes: shape of one row of each tensor; a file that holds something else is made again. -1 is any size.
            make: makes them, float32 or float64 with one row for each in ``rows``.
            progress: told when a file is damaged.

        Raises:
            InputError, EnvironmentProblem, ResourceProblem: the file cannot be written.
        """
        path = self._path(name, rows)
        if path.exists():
            problem, found = _read(path, rows.stop - rows.start, shapes)
            if problem is None:
                return found
            progress.say(f"{path} is not usable ({problem}) and is made again")
        values = make()
        with new_file(path) as temporary:
            save_file({key: np.ascontiguousarray(value) for key, value in values.items()}, temporary)
        return values

    def holds(self, name: str, rows: slice) -> bool:
        """Whether there is a file for these rows; only ``tensors`` knows whether it is whole."""
        return self._path(name, rows).exists()

    def _path(self, name: str, rows: slice) -> Path:
        return self.folder / f"{name}-{rows.start:06d}-{rows.stop:06d}.safetensors"


def _read(path: Path, count: int, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str | None, Tensors]:
    try:
        found = load_file(path)
    except (SafetensorError, OSError) as error:
        return str(error), {}
    if set(found) != set(shapes):
        return f"it holds {', '.join(sorted(found)) or 'nothing'}", {}
    for name, shape in shapes.items():
        value = found[name]
        fits = len(value.shape) == len(shape) + 1 and value.shape[0] == count
        if not fits or any(want not in (-1, have) for want, have in zip(shape, value.shape[1:], strict=True)):
            return f"{name} has shape {list(value.shape)}", {}
        if value.dtype not in (np.float32, np.float64) or not np.isfinite(value).all():
            return f"{name} is not finite float32 or float64", {}
    return None, found
