"""Scales from histograms and weights.

Every scale is rounded to float16 before its error is measured, so what was searched is what is deployed. Activations
use the whole grid, [-128, 127] at 8 bits; weights use [-127, 127] (4 bits: [-7, 7]), so that a code and its negative
both exist and no product of codes can saturate a 16-bit pair sum on CPUs without VNNI.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.artifacts.plan import activation_levels
from qdm_deploy.artifacts.statistics import HISTOGRAM_BINS, Histogram
from qdm_deploy.errors import InputError

__all__ = [
    "METHODS",
    "WEIGHT_LEVELS",
    "ActivationScale",
    "RangeMethod",
    "activation_scale",
    "float16_exact",
    "quantize_weight",
    "weight_levels",
    "weight_scale",
    "weight_sqnr_db",
]

RangeMethod = Literal["minmax", "percentile", "mse", "lp", "l1", "cosine", "kl"]
METHODS: tuple[RangeMethod, ...] = ("minmax", "percentile", "mse", "lp", "l1", "cosine", "kl")
_POWERS = {"mse": 2.0, "lp": 2.4, "l1": 1.0}  # PTQ4DM, table 4, where "MSE" has p = 2.4: it beats cosine, KL and L1
_SEARCHED = (*_POWERS, "cosine", "kl")
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
    """A grid and the error it makes over the histogram.

    Mean |x - x_hat|**p, where p is the method's and 2 for the ranges that do not search; 1 - cos(x, x_hat) for
    "cosine", and a divergence in nats for "kl".
    """

    scale: float
    zero_offset: int
    error: float


def float16_exact(value: float) -> float:
    """The nearest normal float16 to a positive value."""
    return max(float(np.float16(value)), _SMALLEST_SCALE)


def activation_scale(
    histograms: Sequence[tuple[Histogram, float]], method: RangeMethod, *, zero_offset: bool, bits: int = 8
) -> ActivationScale:
    """Choose s and z for values that are known by histograms.

    Args:
        histograms: (histogram of x, factor): the grid sees x / factor, and errors count in units of x.
        method: "minmax", "percentile" (99.99 % of the mass on each side), or a search for the smallest error: "mse",
            "lp" (p = 2.4), "l1", "cosine" or "kl" (the divergence of what the grid leaves of the distribution, as in
            entropy calibration).
        zero_offset: whether z may differ from 0.
        bits: the grid has 2**bits codes.

    Raises:
        InputError: an unknown method, or another number of bits than 4 to 8.
    """
    _refuse_unknown(method)
    qmin, qmax = activation_levels(bits)
    points, counts, factors = _points(histograms)
    low, high = float(points[0]), float(points[-1])
    if method == "percentile":
        mass = np.cumsum(counts) / counts.sum()
        tail = (100 - _PERCENTILE) / 100
        low, high = float(points[np.searchsorted(mass, tail)]), float(points[np.searchsorted(mass, 1 - tail)])
    loss = _loss(points, counts, factors, method, (qmin, qmax))

    def measured(lo: float, hi: float) -> ActivationScale:
        scale, offset = _grid(lo, hi, zero_offset, (qmin, qmax))
        return ActivationScale(scale, offset, loss(scale, offset))

    if method not in _SEARCHED:
        return measured(low, high)
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

    "minmax", "percentile" and "kl" use the largest magnitude (entropy calibration is for activations); the others
    search how far to clip it.

    Raises:
        InputError: an unknown method, or another number of bits.
    """
    _refuse_unknown(method)
    qmax = weight_levels(bits)
    flat = weight.reshape(len(weight), -1)
    rows = max(1, _BLOCK // flat.shape[1])
    return np.concatenate(
        [_row_scales(flat[i : i + rows].astype(np.float64), method, bits, qmax) for i in range(0, len(flat), rows)]
    )


def _row_scales(flat: NDArray[np.float64], method: RangeMethod, bits: int, qmax: int) -> NDArray[np.float32]:
    amax = np.abs(flat).max(axis=1)
    full = _float16(amax / qmax)
    if method not in _SEARCHED or method == "kl":
        return full
    best, best_error = full, np.full(len(flat), np.inf)
    back = np.empty_like(flat)
    for fraction in _WEIGHT_CLIPS[bits]:
        scale = _float16(fraction * amax / qmax)
        np.rint(np.divide(flat, scale[:, None], out=back), out=back)
        np.clip(back, -qmax, qmax, out=back)
        back *= scale[:, None]
        error = _row_errors(flat, back, method)
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


def _row_errors(values: NDArray[np.float64], back: NDArray[np.float64], method: RangeMethod) -> NDArray[np.float64]:
    """Error of each row of [O, N]: a sum of powers, or 1 - cos."""
    if method != "cosine":
        errors: NDArray[np.float64] = (np.abs(values - back) ** _POWERS[method]).sum(axis=1)
        return errors
    norms = np.sqrt((values**2).sum(axis=1) * (back**2).sum(axis=1))
    cosine: NDArray[np.float64] = np.divide((values * back).sum(1), norms, out=np.zeros(len(values)), where=norms > 0)
    return 1 - cosine


def _loss(
    points: NDArray[np.float64],
    counts: NDArray[np.float64],
    factors: NDArray[np.float64],
    method: RangeMethod,
    levels: tuple[int, int],
) -> Callable[[float, int], float]:
    """Error of the grid (s, z) by the method's own measure; by squares for the methods that do not search."""
    if method == "kl":
        return _divergence(points, counts, levels)
    power = _POWERS.get(method, 2.0)
    weights = counts * factors**power / counts.sum()

    def back(scale: float, offset: int) -> NDArray[np.float64]:
        values: NDArray[np.float64] = (np.clip(np.rint(points / scale) - offset, *levels) + offset) * scale
        return values

    if method == "cosine":
        weighted = weights * points
        energy = float((weighted * points).sum())

        def turned(scale: float, offset: int) -> float:
            values = back(scale, offset)
            norm = float(np.sqrt(energy * (weights * values**2).sum()))
            return 1 - float((weighted * values).sum()) / norm if norm > 0 else 1.0

        return turned
    return lambda scale, offset: float((weights * np.abs(points - back(scale, offset)) ** power).sum())


def _divergence(
    points: NDArray[np.float64], counts: NDArray[np.float64], levels: tuple[int, int]
) -> Callable[[float, int], float]:
    """KL(P || Q) in nats of a grid, as entropy calibration counts it (Migacz 2017, "8-bit inference with TensorRT").

    P is the histogram of what the grid sees, with the tails that the grid clips moved into its outermost bins. Q is
    the same histogram without those tails, each code's mass spread evenly over the code's filled bins.
    """
    # All points in bins of one width: interleaved histograms of different factors would not be even inside a code.
    limit = 2.0 ** np.ceil(np.log2(np.abs(points).max() * (1 + 1e-6)))
    index = np.floor((points / limit + 1) * (HISTOGRAM_BINS // 2)).astype(np.int64)
    mass = np.bincount(index, weights=counts, minlength=HISTOGRAM_BINS)
    filled = np.flatnonzero(mass)
    mass, centers = mass[filled] / mass.sum(), ((filled + 0.5) / (HISTOGRAM_BINS // 2) - 1) * limit

    def measured(scale: float, offset: int) -> float:
        codes = np.rint(centers / scale).astype(np.int64) - offset
        first, last = np.searchsorted(codes, levels[0]), np.searchsorted(codes, levels[1], side="right")
        if first == last:
            return np.inf
        kept = mass[first:last].copy()
        code = codes[first:last] - levels[0]
        sums, bins = np.bincount(code, weights=kept), np.bincount(code)
        q = (sums[code] / bins[code]) / kept.sum()
        kept[0] += mass[:first].sum()
        kept[-1] += mass[last:].sum()
        return float((kept * np.log(kept / q)).sum())

    return measured


def _points(
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
