"""The pictures of a report, as PNG bytes: each sample in FP32, in INT8, and how the two differ."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qdm_deploy.errors import InputError

__all__ = ["ReportPictures", "Triplet"]

Picture = NDArray[np.uint8]


@dataclass(frozen=True)
class Triplet:
    """One sample: three PNG files of equal size, and a line about it."""

    reference: bytes
    quantized: bytes
    difference: bytes
    caption: str


@dataclass(frozen=True)
class ReportPictures:
    """What a report shows.

    Attributes:
        triplets: samples of the float and of the INT8 model from the same seeds.
        sheet: PNG of a contact sheet of INT8 samples, if any.
        quantized_name: what ran in INT8, like "openvino".
        amplification: the difference pictures are |FP32 - INT8| times this, cut at 255.
    """

    triplets: tuple[Triplet, ...] = ()
    sheet: bytes | None = None
    quantized_name: str = ""
    amplification: int = 8

    @classmethod
    def from_arrays(
        cls,
        reference: Picture,
        quantized: Picture,
        captions: Sequence[str],
        *,
        sheet: Picture | None = None,
        quantized_name: str = "",
        amplification: int = 8,
    ) -> Self:
        """Encode pictures of the same seeds.

        Args:
            reference: of the float model, [N, H, W] grey or [N, H, W, 3] RGB uint8.
            quantized: of the INT8 model, of the same shape.
            captions: one line for each, like "seed 3 · 38.2 dB".
            sheet: a contact sheet, [H, W] or [H, W, 3] uint8.
            quantized_name: as the attribute.
            amplification: as the attribute.

        Raises:
            InputError: unequal shapes, a caption too few or too many, or an amplification below 1.
        """
        if reference.shape != quantized.shape or len(captions) != len(reference):
            raise InputError(
                f"pictures of shape {list(reference.shape)} and {list(quantized.shape)} with {len(captions)} captions "
                "do not belong together; give equal shapes and one caption for each"
            )
        if amplification < 1:
            raise InputError(f"an amplification of {amplification} would hide differences; give at least 1")
        difference = np.abs(reference.astype(np.int32) - quantized.astype(np.int32)) * amplification
        columns = (reference, quantized, np.minimum(difference, 255).astype(np.uint8))
        return cls(
            triplets=tuple(
                Triplet(_png(a), _png(b), _png(c), caption) for a, b, c, caption in zip(*columns, captions, strict=True)
            ),
            sheet=None if sheet is None else _png(sheet),
            quantized_name=quantized_name,
            amplification=amplification,
        )


def _png(picture: Picture) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
