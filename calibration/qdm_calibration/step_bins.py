"""Timestep bins for the step gains r, chosen from the activations that were measured.

A run passes the timesteps in order, so bins are contiguous, and the best cut of an axis into K stretches is found
exactly by dynamic programming (Bellman 1961, "On the approximation of curves by line segments using dynamic
programming"). A stretch costs what one shared scale over it makes every layer err, relative to the layer's signal and
weighted by how much its timesteps matter. The result is edges in timestep values, so it holds for any sampler.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.artifacts.plan import ACTIVATION_LEVELS
from qdm_deploy.artifacts.statistics import HISTOGRAM_BINS, TensorStatistics
from qdm_deploy.errors import CalibrationError, InputError

__all__ = [
    "COUNTS",
    "LEAST_FALL",
    "GainInput",
    "StepBins",
    "check_step_bins",
    "choose_step_bins",
    "grid_errors",
    "interval_costs",
    "segment",
]

COUNTS = (1, 2, 4, 8)
# 0.5 dB: every further bin is one more entry in each gain's table, and one more scale to get wrong.
LEAST_FALL = 0.11
# Candidate grids of a layer: steps of at most 10 % in width where ranges move 4-fold, and where the grid lies.
_WIDTHS, _OFFSETS = 32, 5
# The narrowest candidate clips the narrowest bin to this part of its range.
_CLIP = 0.2


@dataclass(frozen=True)
class GainInput:
    """An input tensor that may get gains: its statistics, and the factor k of each branch, [G]."""

    tensor: TensorStatistics
    factors: Sequence[float]


@dataclass(frozen=True)
class StepBins:
    """The bins that were chosen.

    Attributes:
        edges: [K + 1] int64 in timestep values, from 0 to T; bin j covers edges[j] .. edges[j + 1] - 1.
        costs: relative noise of the best cut into each number of bins that was tried: the sum over the layers of the
            weighted mean over the timestep ranges; empty where no layer may use gains.
        reason: why this many.
    """

    edges: NDArray[np.int64]
    costs: Mapping[int, float]
    reason: str

    @property
    def count(self) -> int:
        """Number of bins K."""
        return len(self.edges) - 1


def check_step_bins(fine: NDArray[np.int64], bins: int | Literal["auto"]) -> None:
    """Refuse, before any calibration, more gain bins than the timestep bins ``fine`` [M + 1] can tell apart.

    Raises:
        InputError: with what to change.
    """
    if bins != "auto" and bins > len(fine) - 1:
        raise InputError(
            f"{bins} step bins were asked for, but the calibration set only tells {len(fine) - 1} timestep ranges "
            "apart; calibrate with more steps or use fewer bins"
        )


def choose_step_bins(
    fine: NDArray[np.int64],
    inputs: Sequence[GainInput],
    bins: int | Literal["auto"],
    *,
    zero_offset: bool = True,
    gain_ratio: float = 1.3,
    importance: Callable[[], NDArray[np.float64]] | None = None,
) -> StepBins:
    """Cut the timestep axis into K contiguous bins.

    Only inputs whose best scale moves by ``gain_ratio`` or more over the timestep ranges count: the others stay static
    whatever the bins are. Where none moves, "auto" is one bin, and for a given number all inputs and timesteps count.
    Where no input may use gains there is one bin, whatever was asked for.

    "auto" takes the smallest K of 1, 2, 4, 8 after which the next lowers the relative noise of these inputs by less
    than ``LEAST_FALL`` (11 %, 0.5 dB). One bin means no gains.

    Args:
        fine: [M + 1] edges of the timestep bins of the statistics.
        inputs: what may use gains: no input behind a normalization.
        bins: K, or "auto".
        zero_offset: whether grids may have an offset.
        gain_ratio: as in ``PlanOptions``.
        importance: called once, if there is something to choose: how much each of the M timestep bins matters, not
            negative and not all 0; None weighs them equally.

    Raises:
        InputError: more bins than timestep ranges.
        CalibrationError: weights that cannot be used.
    """
    check_step_bins(fine, bins)
    ranges = len(fine) - 1
    whole = fine[[0, -1]]
    if bins == 1:
        return StepBins(whole, {}, "one step bin")
    if ranges == 1:
        return StepBins(whole, {}, "one bin: the calibration set tells no timesteps apart")
    if not inputs:
        return StepBins(whole, {}, "one bin: every input stands behind a normalization, so nothing uses gains")
    measured = [grid_errors(item, zero_offset=zero_offset) for item in inputs]
    moving = [errors for scales, errors in measured if _movement(scales, errors) >= gain_ratio]
    if bins == "auto" and not moving:
        return StepBins(whole, {}, f"one bin, chosen automatically: no input's scale moves {gain_ratio:g}-fold")
    counts = [count for count in COUNTS if count <= ranges] if bins == "auto" else sorted({1, bins})
    settled = bins == ranges or not moving
    weights = np.ones(ranges) if importance is None or settled else _checked(importance(), ranges)
    costs = interval_costs(moving or [errors for _, errors in measured], weights)
    cuts = segment(costs, max(counts))
    total = {count: cuts[count - 1][0] for count in counts}
    chosen = _elbow(total) if bins == "auto" else bins
    return StepBins(fine[cuts[chosen - 1][1]], total, _reason(total, chosen, len(moving), automatic=bins == "auto"))


def grid_errors(item: GainInput, *, zero_offset: bool) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """How much every candidate grid errs in every timestep bin.

    Returns:
        The scales of the candidates, [Q], and their mean squared error relative to the mean square of the input,
        [M, Q]; rows of 0 where the input is 0 throughout.
    """
    tensor = item.tensor
    low, high = _extremes(item)
    scales, offsets = _candidates(low, high, zero_offset)
    time_bins = len(tensor.counts)
    errors, power = np.zeros((time_bins, len(scales))), np.zeros(time_bins)
    for m in range(time_bins):
        for branch, factor in enumerate(item.factors):
            histogram = tensor.histogram(m, branch)
            points = histogram.centers / factor
            # Errors count in units of x, and the grid sees x / k.
            share = histogram.counts * (factor**2 / tensor.counts[m].sum())
            errors[m] += _grid_error(points, share, scales, offsets)
            power[m] += float((share * points**2).sum())
    signal = power > 0
    errors[signal] /= power[signal, None]
    errors[~signal] = 0.0
    return scales, errors


def interval_costs(errors: Sequence[NDArray[np.float64]], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cost of every stretch of timestep bins under its best shared grid, summed over the layers.

    Every stretch chooses its own offset too, where a layer ends with one for all: the cost is a lower bound.

    Args:
        errors: of each layer, [M, Q]; the candidates are the layer's own.
        weights: of the timestep bins, [M].

    Returns:
        [M + 1, M + 1]; entry (i, j) is the cost of bins i .. j - 1, infinite where j <= i.
    """
    count = len(weights)
    costs = np.full((count + 1, count + 1), np.inf)
    for i in range(count):
        costs[i, i + 1 :] = 0.0
    for layer in errors:
        weighted = layer * (weights / weights.sum())[:, None]
        for i in range(count):
            costs[i, i + 1 :] += np.cumsum(weighted[i:], axis=0).min(axis=1)
    return costs


def segment(costs: NDArray[np.float64], most: int) -> list[tuple[float, NDArray[np.int64]]]:
    """The cheapest cut into 1, 2, ... ``most`` stretches: F_k(j) = min over i of F_(k-1)(i) + C(i, j).

    Args:
        costs: [M + 1, M + 1] of ``interval_costs``.
        most: at most M.

    Returns:
        For each number of stretches k the cost and the indices of the edges, [k + 1] int64 from 0 to M.
    """
    last = len(costs) - 1
    best, origins, found = costs[0], [], []
    for k in range(1, most + 1):
        if k > 1:
            through = best[:, None] + costs
            origins.append(through.argmin(axis=0))
            best = through.min(axis=0)
        edges = [last]
        for origin in reversed(origins):
            edges.append(int(origin[edges[-1]]))
        found.append((float(best[last]), np.array([0, *edges[:0:-1], last] if k > 1 else [0, last], dtype=np.int64)))
    return found


def _elbow(costs: Mapping[int, float]) -> int:
    for count, following in pairwise(costs):
        if costs[following] > (1 - LEAST_FALL) * costs[count]:
            return count
    return max(costs)


def _reason(costs: Mapping[int, float], chosen: int, moving: int, *, automatic: bool) -> str:
    inputs = f"{moving} moving input{'s' if moving != 1 else ''}" if moving else "no moving input"
    left = f"{costs[chosen] / costs[1]:.0%} of the relative noise of one bin" if costs[1] > 0 else "no noise to lower"
    if not automatic:
        return f"{chosen} bins as asked for, cut by {inputs}: {left}"
    following = next((count for count in costs if count > chosen), None)
    if following is None:
        return f"{chosen} bins, chosen automatically for {inputs}: {left}"
    fall = 1 - costs[following] / costs[chosen] if costs[chosen] > 0 else 0.0
    less = f"{fall:.1%}, less than {LEAST_FALL:.0%}"
    if chosen == 1:
        return f"one bin, chosen automatically for {inputs}: {following} would lower the relative noise by {less}"
    return f"{chosen} bins, chosen automatically for {inputs}: {left}; {following} would lower it by {less}"


def _checked(weights: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    weights = np.asarray(weights, dtype=np.float64)
    if weights.shape != (count,) or not (weights >= 0).all() or not 0 < weights.sum() < np.inf:
        raise CalibrationError(
            f"{count} weights of timestep bins are needed, none negative and not all 0; given: {weights.tolist()}"
        )
    return weights


def _movement(scales: NDArray[np.float64], errors: NDArray[np.float64]) -> float:
    """How many times the best scale of one timestep bin is that of another, to within a step of the candidates."""
    best = scales[errors[errors.any(axis=1)].argmin(axis=1)]
    return float(best.max() / best.min()) if len(best) else 1.0


def _extremes(item: GainInput) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Smallest and largest value that the grid sees in each timestep bin, [M] each; they span 0."""
    filled = item.tensor.counts > 0
    first, last = filled.argmax(axis=2), HISTOGRAM_BINS - 1 - filled[..., ::-1].argmax(axis=2)
    width = 2.0 ** (item.tensor.exponents + 1) / HISTOGRAM_BINS / np.asarray(item.factors, dtype=np.float64)
    low, high = ((index - HISTOGRAM_BINS / 2 + 0.5) * width for index in (first, last))
    return np.minimum(low.min(axis=1), 0.0), np.maximum(high.max(axis=1), 0.0)


def _candidates(
    low: NDArray[np.float64], high: NDArray[np.float64], zero_offset: bool
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Scales and offsets of the grids to try, [Q] each."""
    qmin, qmax = ACTIVATION_LEVELS
    width = (high - low) / (qmax - qmin) if zero_offset else np.maximum(-low, high) / qmax
    # A layer that is 0 in some bin has no range there to search down to.
    width = np.maximum(width, width.max() * 1e-3)
    scales = np.geomspace(max(_CLIP * width.min(), 2.0**-60), max(width.max(), 2.0**-50), _WIDTHS)
    if not zero_offset:
        return scales, np.zeros(_WIDTHS, dtype=np.int64)
    # Which part of the grid lies below 0: as in some timestep bin, or with one tail clipped to a half.
    tails = [(low, high), (low / 2, high), (low, high / 2)]
    share = np.concatenate([-below / np.maximum(above - below, 2.0**-60) for below, above in tails])
    steps = np.rint(np.linspace(share.min(), share.max(), _OFFSETS) * (qmin - qmax)).astype(np.int64)
    offsets = np.unique(np.clip(steps - qmin, qmin + 1, qmax + 1))
    return np.repeat(scales, len(offsets)), np.tile(offsets, len(scales))


def _grid_error(
    points: NDArray[np.float64],
    counts: NDArray[np.float64],
    scales: NDArray[np.float64],
    offsets: NDArray[np.int64],
) -> NDArray[np.float64]:
    """Sum of counts * (x - x_hat)**2 of every grid, [Q], without rounding a value.

    With H(b) the sum over x < b of counts * (b - x), summation by parts over the codes gives
    sum counts (x - v)**2 - 2 s sum over the borders b between codes of H(b), where v is what the largest code means.
    """
    qmin, qmax = ACTIVATION_LEVELS
    below = np.concatenate([[0.0], np.cumsum(counts)])
    moment = np.concatenate([[0.0], np.cumsum(counts * points)])
    borders = (np.arange(qmin, qmax) + offsets[:, None] + 0.5) * scales[:, None]
    place = (borders - points[0]) / (points[1] - points[0])
    index = np.clip(np.ceil(place), 0, len(points)).astype(np.int64)
    height = (borders * below[index] - moment[index]).sum(axis=1)
    top = (qmax + offsets) * scales
    error = (counts * points**2).sum() - 2 * top * moment[-1] + top**2 * below[-1] - 2 * scales * height
    # Nothing but rounding makes it negative.
    positive: NDArray[np.float64] = np.maximum(error, 0.0)
    return positive
