"""The packed emoji pictures and their captions, as `pack.py` writes them."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import load_file

STYLES = {
    "fluent-3d": "fluent 3d",
    "fluent-flat": "fluent flat",
    "noto": "noto",
    "noto-v1": "old noto",
    "twemoji": "twemoji",
    "emojione": "emojione",
}


def read_captions(folder: Path) -> list[dict[str, Any]]:
    """Per picture: style, label, tags, group, code and split ("train" or "held-out"); in the pictures' order."""
    captions: list[dict[str, Any]] = json.loads((folder / "captions.json").read_text(encoding="utf-8"))
    return captions


def rows_of(captions: list[dict[str, Any]], split: str) -> list[int]:
    """Numbers of the pictures of ``split``."""
    return [row for row, caption in enumerate(captions) if caption["split"] == split]


def read_pictures(folder: Path, rows: list[int]) -> torch.Tensor:
    """Pictures [N, 3, H, W] uint8, in the order of ``rows``."""
    packed = load_file(folder / "pictures.safetensors")
    ends, content = packed["offsets"].tolist(), packed["bytes"]

    def decode(row: int) -> np.ndarray:
        with Image.open(io.BytesIO(content[ends[row] : ends[row + 1]].tobytes())) as picture:
            return np.asarray(picture.convert("RGB"))

    return torch.from_numpy(np.stack([decode(row) for row in rows])).permute(0, 3, 1, 2).contiguous()


def full_caption(style: str, label: str) -> str:
    """The prompt that names both factors, ``style`` as the packed captions spell it."""
    return f"{STYLES[style]} emoji of {label}"


def draw_caption(caption: dict[str, Any], generator: np.random.Generator) -> str:
    """A caption for training.

    One in ten is empty, for classifier-free guidance; of the others one in five adds a tag and one in seven leaves the
    style out.
    """
    empty, tagged, form = generator.random(3)
    if empty < 0.10:
        return ""
    what = caption["label"]
    if caption["tags"] and tagged < 0.2:
        what = f"{what}, {generator.choice(caption['tags'])}"
    if form < 1 / 7:
        return what
    return f"{what}, {STYLES[caption['style']]}" if form < 0.24 else full_caption(caption["style"], what)
