"""How far apart two results are, in decibels and in plain units; all of it in float64.

Decibels of a ratio of energies see a wrong scale, which a cosine does not. They are limited to ±``DECIBEL_LIMIT``, so
that equal results (an infinite ratio) stay a number that JSON, averages and charts can hold; float32 rounding alone is
at about 150 dB.
"""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.errors import InputError

__all__ = ["DECIBEL_LIMIT", "max_abs_difference", "psnr_db", "psnr_per_image_db", "sqnr_db", "sqnr_per_step_db"]

DECIBEL_LIMIT = 200.0
_PIXEL_PEAK = 2.0

Array = NDArray[np.floating[Any]]


def sqnr_db(reference: Array, value: Array) -> float:
    """Signal to quantization noise: 10 log10(sum reference^2 / sum (reference - value)^2).

    Args:
        reference: any shape.
        value: of the same shape.

    Returns:
        dB in [-200, 200]; 200 for equal arrays.

    Raises:
        InputError: unequal shapes, no values, NaN or infinity.
    """
    exact, other = _pair(reference, value)
    return _decibels(float(np.sum(exact**2)), float(np.sum((exact - other) ** 2)))


def sqnr_per_step_db(references: Iterable[Array], values: Iterable[Array]) -> tuple[float, ...]:
    """``sqnr_db`` of each step: of an array [S, ...], or of any two iterables of equal length.

    Raises:
        InputError: unequal numbers of steps, or what ``sqnr_db`` refuses.
    """
    return tuple(sqnr_db(reference, value) for reference, value in _steps(references, values))


def psnr_db(a: Array, b: Array) -> float:
    """Peak signal to noise of pixels in [-1, 1]: 10 log10(peak^2 / mean (a - b)^2), with a peak of 2.

    Both are clipped to [-1, 1] first, as pictures are; the result is the same as for pixels in [0, 1] and a peak of 1.

    Returns:
        dB in [0, 200]; 200 for equal arrays.

    Raises:
        InputError: unequal shapes, no values, NaN or infinity.
    """
    first, second = (np.clip(pixels, -1.0, 1.0) for pixels in _pair(a, b))
    return _decibels(_PIXEL_PEAK**2, float(np.mean((first - second) ** 2)))


def psnr_per_image_db(a: Array, b: Array) -> tuple[float, ...]:
    """``psnr_db`` of each image of two arrays [N, C, H, W].

    Raises:
        InputError: unequal numbers of images, or what ``psnr_db`` refuses.
    """
    return tuple(psnr_db(first, second) for first, second in _steps(a, b))


def max_abs_difference(a: Array, b: Array) -> float:
    """Largest absolute difference.

    Raises:
        InputError: unequal shapes, no values, NaN or infinity.
    """
    first, second = _pair(a, b)
    return float(np.max(np.abs(first - second)))


def _decibels(signal: float, noise: float) -> float:
    if noise == 0.0:
        return DECIBEL_LIMIT
    if signal == 0.0:
        return -DECIBEL_LIMIT
    return max(-DECIBEL_LIMIT, min(DECIBEL_LIMIT, 10.0 * (math.log10(signal) - math.log10(noise))))


def _steps(a: Iterable[Array], b: Iterable[Array]) -> list[tuple[Array, Array]]:
    first, second = list(a), list(b)
    if len(first) != len(second) or not first:
        raise InputError(f"{len(first)} results cannot be compared with {len(second)}; give one for each, at least one")
    return list(zip(first, second, strict=True))


def _pair(a: Array, b: Array) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if a.shape != b.shape or a.size == 0:
        raise InputError(
            f"arrays of shape {list(a.shape)} and {list(b.shape)} cannot be compared; give equal shapes, not empty"
        )
    for name, values in (("first", a), ("second", b)):
        if not np.isfinite(values).all():
            bad = np.count_nonzero(~np.isfinite(values))
            raise InputError(
                f"{bad} of {values.size} values of the {name} array are NaN or infinite: there is no error to measure"
            )
    return a.astype(np.float64), b.astype(np.float64)
