"""The three forms of a shard. Equal pictures give equal bytes: no clock, no user and no order gets into a file.

webdataset: a tar file; a picture is ``000000012.png``, ``.json`` (index, seed, label) and, with classes, ``.cls``.
npz: ``arr_0`` uint8 [N, H, W, 3] (grey is repeated), ``arr_1`` int64 [N] labels with classes, ``index`` int64 [N]; the
layout of guided-diffusion's sample batches, which its evaluator and others read.
png: a folder of ``000000012.png``.
"""

import io
import json
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.batch.options import Format
from qdm_deploy.batch.pictures import Picture
from qdm_deploy.components.pictures import encode_picture

__all__ = ["is_folder", "read_indices", "write_shard"]

_EPOCH = (1980, 1, 1, 0, 0, 0)  # the first day of zip
_KEY = re.compile(r"(\d{9,})\.png")


def is_folder(form: Format) -> bool:
    """Whether a shard of this form is a folder instead of a file."""
    return form == "png"


def write_shard(
    form: Format, path: Path, batches: Iterable[list[Picture]], count: int, shape: tuple[int, int, int]
) -> None:
    """Write a shard as the pictures come.

    Args:
        form: which form.
        path: an empty file, or an empty folder for "png".
        batches: the pictures in order.
        count: how many there will be.
        shape: [C, H, W] of one.

    Raises:
        OSError: the disk is full, or fails.
    """
    _WRITERS[form](path, batches, count, shape)


def read_indices(form: Format, path: Path) -> list[int]:
    """The numbers of a shard's pictures in the order in which it holds them.

    Raises:
        OSError, ValueError: it is not such a shard; ``ValueError`` also for a file cut short.
    """
    try:
        return _READERS[form](path)
    except (tarfile.TarError, zipfile.BadZipFile, KeyError, EOFError) as error:
        raise ValueError(str(error) or type(error).__name__) from error


def _write_tar(path: Path, batches: Iterable[list[Picture]], count: int, shape: tuple[int, int, int]) -> None:
    with path.open("wb") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for picture in _each(batches):
            facts = {
                "index": picture.index,
                "seed": picture.metadata.seed,
                "label": picture.label,
                "class": picture.metadata.label,
            }
            parts = {
                ".json": json.dumps(facts).encode(),
                ".png": encode_picture(picture.pixels, "png", metadata=picture.metadata),
            }
            if picture.label is not None:
                parts[".cls"] = str(picture.label).encode()
            for suffix, content in sorted(parts.items()):
                entry = tarfile.TarInfo(f"{picture.index:09d}{suffix}")  # mtime 0, no owner
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))


def _write_folder(path: Path, batches: Iterable[list[Picture]], count: int, shape: tuple[int, int, int]) -> None:
    for picture in _each(batches):
        (path / f"{picture.index:09d}.png").write_bytes(
            encode_picture(picture.pixels, "png", metadata=picture.metadata)
        )


def _write_npz(path: Path, batches: Iterable[list[Picture]], count: int, shape: tuple[int, int, int]) -> None:
    labels: list[int] = []
    index: list[int] = []

    def pixels(stream: IO[bytes]) -> None:
        header = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape[1:], 3)}
        np.lib.format.write_array_header_1_0(stream, header)
        for picture in _each(batches):
            grey = picture.pixels.ndim == 2
            stream.write(np.ascontiguousarray(np.stack([picture.pixels] * 3, -1) if grey else picture.pixels).data)
            index.append(picture.index)
            if picture.label is not None:
                labels.append(picture.label)

    def numbers(values: list[int]) -> Callable[[IO[bytes]], None]:
        array: NDArray[np.int64] = np.array(values, np.int64)
        return lambda stream: np.lib.format.write_array(stream, array, version=(1, 0), allow_pickle=False)

    with path.open("wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        _add(archive, "arr_0", pixels)
        if labels:
            _add(archive, "arr_1", numbers(labels))
        _add(archive, "index", numbers(index))


def _add(archive: zipfile.ZipFile, name: str, write: Callable[[IO[bytes]], None]) -> None:
    # numpy.savez would stamp the time of day on every array.
    with archive.open(zipfile.ZipInfo(f"{name}.npy", _EPOCH), "w", force_zip64=True) as stream:
        write(stream)


def _each(batches: Iterable[list[Picture]]) -> Iterator[Picture]:
    for batch in batches:
        yield from batch


def _tar_indices(path: Path) -> list[int]:
    with tarfile.open(path, "r:") as archive:
        names = archive.getnames()
    keys = [match[1] for name in names if (match := _KEY.fullmatch(name))]
    if len({name.partition(".")[0] for name in names}) != len(set(keys)):
        raise ValueError("it holds entries that belong to no picture")
    return [int(key) for key in keys]


def _npz_indices(path: Path) -> list[int]:
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as stream:
        # The pictures may be more than memory holds: how many there are is in front of them.
        np.lib.format.read_magic(stream)
        (count, *_), _, _ = np.lib.format.read_array_header_1_0(stream)
    with np.load(path, allow_pickle=False) as arrays:
        index: list[int] = arrays["index"].tolist()
    if count != len(index):
        raise ValueError(f"arr_0 holds {count} pictures and index {len(index)}")
    return index


def _folder_indices(path: Path) -> list[int]:
    names = sorted(entry.name for entry in path.iterdir())
    matches = [_KEY.fullmatch(name) for name in names]
    if None in matches:
        raise ValueError(f"{names[matches.index(None)]} is not a picture of this job")
    return sorted(int(match[1]) for match in matches if match is not None)


_WRITERS: dict[Format, Callable[[Path, Iterable[list[Picture]], int, tuple[int, int, int]], None]] = {
    "webdataset": _write_tar,
    "npz": _write_npz,
    "png": _write_folder,
}
_READERS: dict[Format, Callable[[Path], list[int]]] = {
    "webdataset": _tar_indices,
    "npz": _npz_indices,
    "png": _folder_indices,
}
