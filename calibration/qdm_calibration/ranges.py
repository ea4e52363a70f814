"""Scales from histograms and weights.

Every scale is rounded to float16 before its error is measured, so what was searched is what is deployed. Activations
use the whole grid, [-128, 127]; weights use [-127, 127] (4 bits: [-7, 7]), so that a code and its negative both exist
and no product of codes can saturate a 16-bit pair sum on CPUs without VNNI.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.artifacts.plan import ACTIVATION_LEVELS
from qdm_deploy.artifacts.recipe import RangeMethod
from qdm_deploy.artifacts.statistics import Histogram
from qdm_deploy.errors import InputError

__all__ = [
    "METHODS",
    "WEIGHT_LEVELS",
    "ActivationScale",
    "activation_scale",
    "float16_exact",
    "grid_points",
    "quantize_weight",
    "search_scale",
    "search_weight_scale",
    "weight_levels",
    "weight_scale",
    "weight_sqnr_db",
]

METHODS: tuple[RangeMethod, ...] = get_args(RangeMethod)
_POWERS = {"mse": 2.0, "lp": 2.4}  # PTQ4DM, table 4, where "MSE" has p = 2.4: it beats cosine, KL and L1
_PERCENTILE = 99.99
# The smallest normal float16: TensorRT flushes smaller scales to zero and refuses the network.
_SMALLEST_SCALE = 2.0**-14
# Largest weight code by bits; symmetric, so that a code and its negative both exist at 4 bits too.
WEIGHT_LEVELS: Mapping[int, int] = MappingProxyType({8: 127, 4: 7})
# Weights searched at a time: what the search touches again and again stays in the cache, which is three times as fast.
_BLOCK = 1 << 16
# How far the search clips the largest magnitude: a grid of 15 codes gains from much harder clipping than one of 255.
_WEIGHT_CLIPS: Mapping[int, NDArray[np.float64]] = {8: np.linspace(1.0, 0.6, 41), 4: np.linspace(1.0, 0.35, 66)}


@dataclass(frozen=True)
class ActivationScale:
    """A grid and the error it makes over the histogram: what was searched, or the mean square where nothing was."""

    scale: float
    zero_offset: int
    error: float


def float16_exact(value: float) -> float:
    """The nearest normal float16 to a positive value."""
    return max(float(np.float16(value)), _SMALLEST_SCALE)


def activation_scale(
    histograms: Sequence[tuple[Histogram, float]], method: RangeMethod, *, zero_offset: bool
) -> ActivationScale:
    """Choose s and z for values that are known by histograms.

    Args:
        histograms: (histogram of x, factor): the grid sees x / factor, and errors count in units of x.
        method: "minmax", "percentile" (99.99 % of the mass on each side), or a search for the smallest mean
            |x - x_hat|**p: "mse" (p = 2) or "lp" (p = 2.4).
        zero_offset: whether z may differ from 0.

    Raises:
        InputError: an unknown method.
    """
    _refuse_unknown(method)
    points, counts, factors = grid_points(histograms)
    power = _POWERS.get(method, 2.0)
    weights = counts * factors**power / counts.sum()
    low, high = float(points[0]), float(points[-1])

    def loss(scale: float, offset: int) -> float:
        back = (np.clip(np.rint(points / scale) - offset, *ACTIVATION_LEVELS) + offset) * scale
        return float((weights * np.abs(points - back) ** power).sum())

    if method in _POWERS:
        return search_scale(low, high, loss, zero_offset=zero_offset)
    if method == "percentile":
        mass = np.cumsum(counts) / counts.sum()
        tail = (100 - _PERCENTILE) / 100
        low, high = float(points[np.searchsorted(mass, tail)]), float(points[np.searchsorted(mass, 1 - tail)])
    scale, offset = _grid(low, high, zero_offset, ACTIVATION_LEVELS)
    return ActivationScale(scale, offset, loss(scale, offset))


def search_scale(
    low: float,
    high: float,
    loss: Callable[[float, int], float],
    *,
    zero_offset: bool,
    levels: tuple[int, int] = ACTIVATION_LEVELS,
) -> ActivationScale:
    """The s and z of the smallest loss, over how much of [low, high] the grid clips on each side.

    Args:
        low: the smallest value that the grid sees.
        high: the largest.
        loss: the error of a grid, of s and z.
        zero_offset: whether z may differ from 0.
        levels: the smallest and the largest code.
    """

    def measured(lo: float, hi: float) -> ActivationScale:
        scale, offset = _grid(lo, hi, zero_offset, levels)
        return ActivationScale(scale, offset, loss(scale, offset))

    # Two passes over how much of each tail to clip: a coarse grid, then a fine one around its best cell.
    best, best_cell = measured(low, high), (1.0, 1.0)
    step = 0.08
    for _ in range(3):
        center = best_cell
        for i in range(-8 if step < 0.08 else -10, 9 if step < 0.08 else 1):
            for j in range(-8 if step < 0.08 else -10, 9 if step < 0.08 else 1) if zero_offset else (i,):
                cell = (center[0] + i * step, center[1] + j * step)
                if min(cell) <= 0.02 or max(cell) > 1.0:
                    continue
                candidate = measured(low * cell[0], high * cell[1])
                if candidate.error < best.error:
                    best, best_cell = candidate, cell
        step /= 6
    return best


def weight_scale(weight: NDArray[np.float32], method: RangeMethod, bits: int = 8) -> NDArray[np.float32]:
    """w per output channel, [O] float32 exact in float16, for a weight [O, ...] that gets codes of 8 or 4 bits.

    "minmax" and "percentile" use the largest magnitude; the others search how far to clip it.

    Raises:
        InputError: an unknown method, or another number of bits.
    """
    _refuse_unknown(method)
    if method not in _POWERS:
        return _float16(np.abs(weight.reshape(len(weight), -1)).max(axis=1).astype(np.float64) / weight_levels(bits))
    power = _POWERS[method]
    return search_weight_scale(weight, lambda values, back: (np.abs(values - back) ** power).sum(axis=1), bits)


RowErrors = Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]


def search_weight_scale(weight: NDArray[np.float32], errors: RowErrors, bits: int = 8) -> NDArray[np.float32]:
    """The w per output channel, [O] float32 exact in float16, of the smallest error, over how far to clip a row.

    Args:
        weight: [O, ...].
        errors: of rows [o, N] and of what their codes mean, [o, N]; [o].
        bits: 8 or 4.

    Raises:
        InputError: another number of bits.
    """
    qmax = weight_levels(bits)
    flat = weight.reshape(len(weight), -1)
    rows = max(1, _BLOCK // flat.shape[1])
    return np.concatenate(
        [_row_scales(flat[i : i + rows].astype(np.float64), errors, bits, qmax) for i in range(0, len(flat), rows)]
    )


def _row_scales(flat: NDArray[np.float64], errors: RowErrors, bits: int, qmax: int) -> NDArray[np.float32]:
    amax = np.abs(flat).max(axis=1)
    full = _float16(amax / qmax)
    best, best_error = full, np.full(len(flat), np.inf)
    back = np.empty_like(flat)
    for fraction in _WEIGHT_CLIPS[bits]:
        scale = _float16(fraction * amax / qmax)
        np.rint(np.divide(flat, scale[:, None], out=back), out=back)
        np.clip(back, -qmax, qmax, out=back)
        back *= scale[:, None]
        error = errors(flat, back)
        better = error < best_error
        best, best_error = np.where(better, scale, best), np.where(better, error, best_error)
    return best.astype(np.float32)


def weight_levels(bits: int) -> int:
    """The largest weight code of that many bits.

    Raises:
        InputError: neither 8 nor 4 bits.
    """
    if bits not in WEIGHT_LEVELS:
        raise InputError(f"weights of {bits} bits were asked for; choose 8 or 4")
    return WEIGHT_LEVELS[bits]


def quantize_weight(weight: NDArray[np.float32], scale: NDArray[np.float32], bits: int = 8) -> NDArray[np.int8]:
    """Nearest codes (half to even) of a weight [O, ...] on a scale per output channel."""
    qmax = weight_levels(bits)
    shaped = scale.reshape(-1, *([1] * (weight.ndim - 1)))
    codes: NDArray[np.int8] = np.clip(np.rint(weight / shaped), -qmax, qmax).astype(np.int8)
    return codes


def weight_sqnr_db(weight: NDArray[np.float32], codes: NDArray[np.int8], scale: NDArray[np.float32]) -> float | None:
    """SQNR of codes [O, ...] on scales [O] against the weight they stand for, in dB; None where they are exact."""
    noise = float(((weight - codes * scale.reshape(-1, *([1] * (weight.ndim - 1)))) ** 2).sum())
    return 10 * float(np.log10(float((weight**2).sum()) / noise)) if noise else None


def _refuse_unknown(method: str) -> None:
    if method not in METHODS:
        raise InputError(f"range method {method!r} is not known; choose one of {', '.join(METHODS)}")


def grid_points(
    histograms: Sequence[tuple[Histogram, float]],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Distinct grid inputs in ascending order, how often each occurred, and the factor that takes each back to x."""
    points, counts, factors = [], [], []
    for histogram, factor in histograms:
        filled = histogram.counts > 0
        points.append(histogram.centers[filled] / factor)
        counts.append(histogram.counts[filled].astype(np.float64))
        factors.append(np.full(int(filled.sum()), factor))
    order = np.argsort(np.concatenate(points), kind="stable")
    return np.concatenate(points)[order], np.concatenate(counts)[order], np.concatenate(factors)[order]


def _grid(low: float, high: float, zero_offset: bool, levels: tuple[int, int]) -> tuple[float, int]:
    """s and z of the grid that spans [low, high], which always holds 0."""
    qmin, qmax = levels
    low, high = min(low, 0.0), max(high, 0.0)
    if not zero_offset:
        return float16_exact(max(-low, high) / qmax), 0
    scale = float16_exact((high - low) / (qmax - qmin))
    offset = round(low / scale) - qmin
    return scale, int(np.clip(offset, qmin + 1, qmax + 1))


def _float16(scale: NDArray[np.float64]) -> NDArray[np.float32]:
    return np.maximum(scale.astype(np.float16).astype(np.float32), np.float32(_SMALLEST_SCALE))
