"""Pictures from IDX files and from folders, written by the test."""

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image


def idx(values: np.ndarray, kind: int = 8) -> bytes:
    """An IDX file: two zero bytes, the type, the number of dimensions, their sizes, the values."""
    return gzip.compress(struct.pack(f">HBB{values.ndim}I", 0, kind, values.ndim, *values.shape) + values.tobytes())


@pytest.fixture
def pictures() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 6, 6), dtype=np.uint8)


def write_idx(folder: Path, pictures: np.ndarray, name: str = "train") -> None:
    (folder / f"{name}-images-idx3-ubyte.gz").write_bytes(idx(pictures))
    (folder / f"{name}-labels-idx1-ubyte.gz").write_bytes(idx(np.arange(len(pictures), dtype=np.uint8) % 3))


def test_idx_files(datasets: Any, pictures: np.ndarray, tmp_path: Path) -> None:
    write_idx(tmp_path, pictures)
    write_idx(tmp_path, pictures[:2], "t10k")
    found, labels = datasets.read_pictures(tmp_path, 6)
    assert np.array_equal(found.numpy(), pictures[:, None])
    assert labels.tolist() == [0, 1, 2, 0, 1]
    assert len(datasets.read_pictures(tmp_path, 6, name="t10k")[0]) == 2
    for size, channels, wanted in ((8, 1, "1x8x8"), (6, 3, "3x6x6")):
        with pytest.raises(SystemExit, match=f"holds pictures of 1x6x6; the model wants {wanted}"):
            datasets.read_pictures(tmp_path, size, channels)


def test_a_file_of_another_type_is_refused(datasets: Any, pictures: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(idx(pictures, kind=13))
    with pytest.raises(SystemExit, match=r"train-images-idx3-ubyte\.gz is not an IDX file of unsigned bytes"):
        datasets.read_pictures(tmp_path, 6)


def test_folders_of_pictures(datasets: Any, pictures: np.ndarray, tmp_path: Path) -> None:
    for label in ("bag", "ankle boot"):
        (tmp_path / label).mkdir()
    Image.fromarray(pictures[0]).save(tmp_path / "bag" / "1.png")
    # Wider than high: the middle is what counts.
    wide = np.zeros((6, 10), np.uint8)
    wide[:, 2:8] = pictures[1]
    Image.fromarray(wide).save(tmp_path / "ankle boot" / "2.bmp")
    (tmp_path / "bag" / "notes.txt").write_text("no picture")
    found, labels = datasets.read_pictures(tmp_path, 6)
    # In alphabetical order, so the boot comes first.
    assert labels.tolist() == [0, 1]
    assert np.array_equal(found.numpy(), pictures[[1, 0]][:, None])

    colours, _ = datasets.read_pictures(tmp_path, 12, 3)
    assert tuple(colours.shape) == (2, 3, 12, 12)
    assert np.array_equal(colours[:, 0], colours[:, 2])
    assert abs(float(colours[1].float().mean()) - float(pictures[0].mean())) < 10


def test_a_folder_without_either_is_refused(datasets: Any, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(SystemExit, match=r"holds neither train-images-idx3-ubyte\.gz nor folders of pictures"):
            datasets.read_pictures(folder, 6)
