"""Labelled pictures for the training examples: the IDX files of Fashion-MNIST, or any folder of picture folders."""

import gzip
import struct
from pathlib import Path

import numpy as np
import torch
from PIL import Image

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}


def read_pictures(folder: Path, size: int, channels: int = 1, name: str = "train") -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures [N, channels, size, size] uint8 and labels [N] int64.

    ``folder`` holds either ``NAME-images-idx3-ubyte.gz`` and ``NAME-labels-idx1-ubyte.gz`` (``name`` is train or
    t10k; Debian's package dataset-fashion-mnist installs them), or one folder of pictures per label, numbered in
    alphabetical order; those pictures are cropped to a centred square and resized.
    """
    images_path = folder / f"{name}-images-idx3-ubyte.gz"
    if images_path.is_file():
        pictures = read_idx(images_path)[:, None]
        if channels != 1 or pictures.shape[2:] != (size, size):
            held = "x".join(map(str, pictures.shape[1:]))
            raise SystemExit(f"{images_path} holds pictures of {held}; the model wants {channels}x{size}x{size}")
        labels = read_idx(folder / f"{name}-labels-idx1-ubyte.gz")
        return torch.from_numpy(pictures.copy()), torch.from_numpy(labels.astype(np.int64))
    kinds = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    files = [(path, label) for label, kind in enumerate(kinds) for path in sorted(kind.iterdir())]
    files = [(path, label) for path, label in files if path.suffix.lower() in _SUFFIXES]
    if not files:
        raise SystemExit(f"{folder} holds neither {images_path.name} nor folders of pictures, one per label")
    pictures = np.stack([_square(path, size, channels) for path, _ in files])
    return torch.from_numpy(pictures), torch.tensor([label for _, label in files])


def read_idx(path: Path) -> np.ndarray:
    """An IDX file of unsigned bytes (http://yann.lecun.com/exdb/mnist, "THE IDX FILE FORMAT")."""
    content = gzip.decompress(path.read_bytes())
    zeros, kind, dimensions = struct.unpack(">HBB", content[:4])
    if zeros != 0 or kind != 8:
        raise SystemExit(f"{path} is not an IDX file of unsigned bytes")
    shape = struct.unpack(f">{dimensions}I", content[4 : 4 + 4 * dimensions])
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def _square(path: Path, size: int, channels: int) -> np.ndarray:
    """One picture [channels, size, size] uint8."""
    with Image.open(path) as picture:
        picture = picture.convert("L" if channels == 1 else "RGB")
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        picture = picture.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
        values = np.asarray(picture)
    return values[None] if channels == 1 else values.transpose(2, 0, 1)
