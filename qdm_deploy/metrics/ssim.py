"""Structural similarity of pictures (Wang, Bovik, Sheikh and Simoncelli 2004, "Image quality assessment", eq. 13)."""

from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from qdm_deploy.errors import InputError

__all__ = ["SSIM_WINDOW", "ssim_per_image"]

SSIM_WINDOW = 11
_SIGMA = 1.5
# (K1 L)^2 and (K2 L)^2 of the paper, with L = 1 for pixels in [0, 1].
_C1, _C2 = 0.01**2, 0.03**2

Array = NDArray[np.floating[Any]]


def ssim_per_image(a: Array, b: Array) -> tuple[float, ...]:
    """Mean SSIM of each pair of pictures: Gaussian window of 11x11 with sigma 1.5, where it fits entirely.

    Args:
        a: [N, C, H, W] pixels in [-1, 1]; clipped to that and mapped to [0, 1]. Channels are averaged.
        b: of the same shape.

    Returns:
        N values in [-1, 1]; 1 for equal pictures.

    Raises:
        InputError: unequal shapes, no pictures, a side below 11 pixels, NaN or infinity.
    """
    if a.shape != b.shape or a.ndim != 4 or a.size == 0:
        raise InputError(
            f"pictures of shape {list(a.shape)} and {list(b.shape)} cannot be compared; give equal shapes [N, C, H, W]"
        )
    if min(a.shape[2:]) < SSIM_WINDOW:
        raise InputError(
            f"pictures of {a.shape[2]}x{a.shape[3]} pixels have no SSIM: its window needs {SSIM_WINDOW}x{SSIM_WINDOW}"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        bad = np.count_nonzero(~np.isfinite(a)) + np.count_nonzero(~np.isfinite(b))
        raise InputError(f"{bad} pixels are NaN or infinite: such pictures have no SSIM")
    # One picture at a time: the windows of a large set would not fit into memory.
    return tuple(_ssim(_unit(first), _unit(second)) for first, second in zip(a, b, strict=True))


def _unit(picture: Array) -> NDArray[np.float64]:
    return (np.clip(picture.astype(np.float64), -1.0, 1.0) + 1.0) / 2.0


def _ssim(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    mean_a, mean_b = _blur(a), _blur(b)
    variance_a = _blur(a * a) - mean_a**2
    variance_b = _blur(b * b) - mean_b**2
    covariance = _blur(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + _C1) / (mean_a**2 + mean_b**2 + _C1)
    structure = (2 * covariance + _C2) / (variance_a + variance_b + _C2)
    return float(np.mean(luminance * structure))


def _blur(picture: NDArray[np.float64]) -> NDArray[np.float64]:
    """[C, H, W] to [C, H - 10, W - 10]; the two-dimensional Gaussian is the product of two lines."""
    offsets = np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2
    line = np.exp(-(offsets**2) / (2 * _SIGMA**2))
    line /= line.sum()
    for axis in (1, 2):
        picture = sliding_window_view(picture, SSIM_WINDOW, axis=axis) @ line
    return picture
