"""Samples as pictures: PNG files that say how they were made, contact sheets, and comparisons of two runs.

Pictures are uint8 arrays: [N, H, W] grey or [N, H, W, 3] RGB for a set, [H, W] or [H, W, 3] for one.
"""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from pydantic import BaseModel, ConfigDict, ValidationError

from qdm_deploy.artifacts.files import new_file
from qdm_deploy.artifacts.pipeline_spec import PipelineSpec
from qdm_deploy.errors import InputError

__all__ = [
    "ImageMetadata",
    "comparison_strip",
    "contact_sheet",
    "encode_picture",
    "made_by",
    "read_metadata",
    "save_png",
    "to_pictures",
]

_PREFIX = "qdm-deploy:"
_GAP = 2
_PAPER = 255
_CAPTION_PIXELS = 12
_SMALL_SIDE = 96

Picture = NDArray[np.uint8]


class ImageMetadata(BaseModel):
    """How a picture was made; with the bundle it is enough to make it again.

    ``label`` is what it shows: a class, or the prompt.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: str
    bundle_id: str
    seed: int
    sampler: str
    steps: int
    eta: float = 0.0
    guidance: float = 1.0
    guidance_rescale: float = 0.0
    label: str | None = None
    negative_prompt: str | None = None
    clip_skip: int | None = None
    weighting: bool = False
    backend: str


def to_pictures(samples: NDArray[np.float32], model: PipelineSpec) -> Picture:
    """Samples or decoded latents in [-1, 1] as pictures; what lies outside is clipped.

    Args:
        samples: [N, C, H, W] float32.
        model: the model they come from.

    Returns:
        [N, H, W] uint8 for one channel, [N, H, W, 3] for three: round((x + 1) / 2 * 255).

    Raises:
        InputError: samples are latents, are not those of the model, are not grey or RGB, or hold NaN or infinity.
    """
    shape = model.picture_shape
    if shape is None:
        raise InputError(
            f"the samples of the model {model.name!r} are latents, and it has no decoder to make pictures of them; "
            "save them as arrays"
        )
    if samples.ndim != 4 or samples.shape[1:] != shape or samples.shape[1] not in (1, 3):
        raise InputError(
            f"samples of shape {list(samples.shape)} cannot become pictures; the model {model.name!r} makes "
            f"[N, {', '.join(map(str, shape))}], and pictures have 1 or 3 channels"
        )
    if not np.isfinite(samples).all():
        raise InputError(f"{np.count_nonzero(~np.isfinite(samples))} of {samples.size} values are NaN or infinite")
    pixels = np.rint((np.clip(samples, -1.0, 1.0) + 1.0) * 127.5).astype(np.uint8)
    return pixels[:, 0] if samples.shape[1] == 1 else np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))


def save_png(path: Path, picture: Picture, metadata: ImageMetadata | None = None) -> None:
    """Write one picture as a PNG file that is either complete or not there; see ``encode_picture``.

    Raises:
        InputError, EnvironmentProblem, ResourceProblem: the file cannot be written.
    """
    with new_file(path) as temporary:
        temporary.write_bytes(encode_picture(picture, "png", metadata=metadata))


def encode_picture(
    picture: Picture, output_format: str, *, quality: int = 100, metadata: ImageMetadata | None = None
) -> bytes:
    """One picture as the bytes of a file; equal input gives equal bytes.

    Args:
        picture: [H, W] or [H, W, 3] uint8.
        output_format: png, webp or jpeg.
        quality: of webp and jpeg, 0 .. 100; both lose something even at 100.
        metadata: how it was made; png carries it, one text chunk a field, the others have no place for it.

    Raises:
        InputError: another format, or a quality out of range.
    """
    if output_format not in ("png", "webp", "jpeg"):
        raise InputError(f"pictures cannot be encoded as {output_format!r}; choose png, webp or jpeg")
    if not 0 <= quality <= 100:
        raise InputError(f"a quality of {quality} is out of range; choose 0 .. 100")
    image, file = Image.fromarray(picture), io.BytesIO()
    if output_format == "png":
        image.save(file, format="PNG", pnginfo=_chunks(metadata))
    else:
        image.save(file, format=output_format.upper(), quality=quality)
    return file.getvalue()


def _chunks(metadata: ImageMetadata | None) -> PngImagePlugin.PngInfo:
    chunks = PngImagePlugin.PngInfo()
    if metadata is not None:
        for name, value in metadata.model_dump(exclude_none=True).items():
            chunks.add_text(_PREFIX + name, str(value))
    return chunks


def made_by(engine: Mapping[str, object], precision: str) -> str:
    """``ImageMetadata.backend``: the backend of ``StepSession.describe()`` and its precision."""
    return f"{engine['backend']} {precision}"


def read_metadata(path: Path) -> ImageMetadata:
    """How a picture was made, from the PNG that ``save_png`` wrote.

    Raises:
        InputError: not a readable PNG, or not written by qdm-deploy, or its metadata is incomplete.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            text = {key: value for key, value in image.info.items() if isinstance(key, str)}
    except (
        OSError,
        SyntaxError,
        ValueError,
        Image.DecompressionBombError,
    ) as error:  # Pillow's own list is not one class
        raise InputError(f"{path} is not a readable PNG file: {error}") from error
    fields = {key.removeprefix(_PREFIX): value for key, value in text.items() if key.startswith(_PREFIX)}
    try:
        return ImageMetadata.model_validate(fields)
    except ValidationError as error:
        problems = ", ".join(f"{problem['loc'][0]}: {problem['msg']}" for problem in error.errors())
        raise InputError(f"{path} does not hold the metadata of a qdm-deploy picture ({problems})") from error


def contact_sheet(
    pictures: Picture, *, columns: int | None = None, captions: Sequence[str] | None = None, scale: int | None = None
) -> Picture:
    """A grid of pictures with thin gaps, row by row.

    Args:
        pictures: [N, H, W] or [N, H, W, 3] uint8.
        columns: pictures in a row; None makes the grid about square.
        captions: a line under each picture, cut to its width.
        scale: whole-number enlargement with hard pixels; None makes the shorter side at least 96 pixels.

    Returns:
        One picture, [H', W'] or [H', W', 3] uint8.

    Raises:
        InputError: no pictures, or columns, captions or scale do not fit them.
    """
    count = len(pictures)
    if count == 0:
        raise InputError("there are no pictures to put on a contact sheet; give at least one")
    columns = columns if columns is not None else math.ceil(math.sqrt(count))
    if columns < 1:
        raise InputError(f"a contact sheet cannot have {columns} columns; give at least 1")
    if captions is not None and len(captions) != count:
        raise InputError(f"{len(captions)} captions were given for {count} pictures; give one for each")
    large = _enlarged(pictures, scale)
    height, width = large.shape[1:3]
    line = _CAPTION_PIXELS + _GAP if captions is not None else 0
    rows = math.ceil(count / columns)
    sheet = np.full(
        (rows * (height + line + _GAP) + _GAP, columns * (width + _GAP) + _GAP, *large.shape[3:]), _PAPER, np.uint8
    )
    for index, picture in enumerate(large):
        row, column = divmod(index, columns)
        top, left = _GAP + row * (height + line + _GAP), _GAP + column * (width + _GAP)
        sheet[top : top + height, left : left + width] = picture
        if captions is not None:
            _write(sheet[top + height : top + height + line, left : left + width], captions[index])
    return sheet


def comparison_strip(
    a: Picture,
    b: Picture,
    *,
    names: tuple[str, str] = ("A", "B"),
    amplification: int = 8,
    scale: int | None = None,
) -> Picture:
    """Two runs of the same seeds above each other, and below them how they differ.

    Args:
        a: the pictures of the first run, [N, H, W] or [N, H, W, 3] uint8.
        b: those of the second run, of the same shape.
        names: what the rows are called, under each row's first picture.
        amplification: the third row is |a - b| times this, cut at 255: black where they agree.
        scale: as in ``contact_sheet``.

    Returns:
        One picture, three rows of N, [H', W'] or [H', W', 3] uint8.

    Raises:
        InputError: no pictures, unequal shapes, or an amplification below 1.
    """
    if a.shape != b.shape:
        raise InputError(f"pictures of shape {list(a.shape)} and {list(b.shape)} cannot be compared; give equal shapes")
    if amplification < 1:
        raise InputError(f"an amplification of {amplification} would hide differences; give at least 1")
    difference = np.abs(a.astype(np.int32) - b.astype(np.int32)) * amplification
    rows = np.concatenate([a, b, np.minimum(difference, 255).astype(np.uint8)])
    blank = [""] * (len(a) - 1)
    captions = [names[0], *blank, names[1], *blank, f"difference x {amplification}", *blank]
    return contact_sheet(rows, columns=len(a), captions=captions[: len(rows)], scale=scale)


def _enlarged(pictures: Picture, scale: int | None) -> Picture:
    if scale is None:
        scale = math.ceil(_SMALL_SIDE / min(pictures.shape[1:3]))
    if scale < 1:
        raise InputError(f"pictures cannot be enlarged by {scale}; give a whole number of at least 1")
    return pictures.repeat(scale, axis=1).repeat(scale, axis=2)


def _write(place: Picture, text: str) -> None:
    """Write black text into a white part of a sheet, as much of it as fits."""
    font = ImageFont.load_default(_CAPTION_PIXELS - 2)
    while text and font.getlength(text) > place.shape[1]:
        text = text[:-1]
    image = Image.fromarray(np.ascontiguousarray(place))
    ImageDraw.Draw(image).text((0, 0), text, fill=0 if place.ndim == 2 else (0, 0, 0), font=font)
    place[:] = np.asarray(image)
