"""Whether B is further from the real pictures than A is, when both were made from the same seeds.

The difference of the two distances is resampled over the seeds, with the same seeds for A and B: what a lucky or
unlucky choice of seeds does to both cancels, and so does most of the distances' bias at small N.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.errors import InputError
from qdm_deploy.metrics.bootstrap import RESAMPLES, Interval, interval_of, resampled_indices
from qdm_deploy.metrics.distribution import (
    Gaussian,
    classifier_score,
    frechet_distance,
    gaussian_of,
    kernel_blocks,
    probabilities,
)
from qdm_deploy.progress import SILENT, Progress

__all__ = ["KERNEL_LIMIT", "frechet_difference", "kernel_difference", "score_difference"]

# The kernel's draws cost as much as the square of the number of pictures; beyond this they take many minutes.
KERNEL_LIMIT = 20_000
_KERNEL_RESAMPLES = 1000

Array = NDArray[np.floating[Any]]


def frechet_difference(
    real: Gaussian, a: Array, b: Array, *, resamples: int = RESAMPLES, seed: int = 0, progress: Progress = SILENT
) -> Interval:
    """frechet_distance(real, B) - frechet_distance(real, A), with its interval; positive where B is further away.

    Args:
        real: the real pictures' features; they are not resampled.
        a: [N, D] features of A's pictures.
        b: [N, D] features of B's pictures of the same seeds, in the same order.
        resamples: bootstrap draws; each takes the same rows of ``a`` and ``b``.
        seed: of the draws.
        progress: advances by one for each draw.

    Raises:
        InputError: unequal shapes, fewer than two pairs, NaN or infinity.
    """
    _refuse_no_pairs(a, b)
    root = real.root

    def difference(rows: slice | NDArray[np.int64]) -> float:
        first, second = (frechet_distance(real, gaussian_of(side[rows]), first_root=root) for side in (a, b))
        return second - first

    draws = []
    with progress.task("Resampling the Frechet difference", resamples) as advance:
        for rows in resampled_indices(len(a), resamples=resamples, seed=seed):
            draws.append(difference(rows))
            advance()
    return interval_of(difference(slice(None)), draws)


def kernel_difference(
    real: Array,
    a: Array,
    b: Array,
    *,
    resamples: int = _KERNEL_RESAMPLES,
    seed: int = 0,
    progress: Progress = SILENT,
) -> Interval:
    """kernel_distance(real, B) - kernel_distance(real, A), with its interval; positive where B is further away.

    A draw weighs pairs of different seeds by how often it holds both, and leaves out pairs of a seed with itself, as
    the unbiased estimate does: without that, every draw would be off by the kernel's value at equal pictures.

    Args:
        real: [M, D] features of real pictures; they are not resampled.
        a: [N, D] features of A's pictures.
        b: [N, D] features of B's pictures of the same seeds, in the same order.
        resamples: bootstrap draws; each takes the same seeds of ``a`` and ``b``.
        seed: of the draws.
        progress: advances by one for each block of 1024 pictures.

    Raises:
        InputError: unequal shapes, fewer than two pairs.
    """
    _refuse_no_pairs(a, b)
    x, y, other = (side.astype(np.float64) for side in (a, b, real))
    count = len(x)
    # [R, N]: how often each draw holds each seed, after one row for the estimate itself.
    weights = np.ones((resamples + 1, count), dtype=np.float32)
    for row, rows in enumerate(resampled_indices(count, resamples=resamples, seed=seed), 1):
        weights[row] = np.bincount(rows, minlength=count)
    within, across = np.zeros(resamples + 1), np.zeros(resamples + 1)
    start = 0
    blocks = zip(
        kernel_blocks(x, x), kernel_blocks(y, y), kernel_blocks(x, other), kernel_blocks(y, other), strict=True
    )
    with progress.task("Resampling the kernel difference", count) as advance:
        for of_a, of_b, a_real, b_real in blocks:
            here = weights[:, start : start + len(of_a)]
            own = of_b - of_a
            own[np.arange(len(own)), start + np.arange(len(own))] = 0.0
            within += np.einsum("rn,rn->r", here @ own.astype(np.float32), weights, dtype=np.float64)
            across += here @ (b_real.mean(axis=1) - a_real.mean(axis=1))
            start += len(of_a)
            advance(len(of_a))
    pairs = float(count) ** 2 - np.einsum("rn,rn->r", weights, weights, dtype=np.float64)
    draws = within / pairs - 2.0 * across / count
    return interval_of(float(draws[0]), draws[1:])


def score_difference(a: Array, b: Array, *, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """classifier_score(B) - classifier_score(A) of logits [N, K] of the same seeds, with its interval.

    Raises:
        InputError: unequal shapes, fewer than two pairs, NaN or infinity.
    """
    _refuse_no_pairs(a, b)
    sides = [probabilities(side) for side in (a, b)]
    # exp(mean_x sum_y p log p - sum_y p(y) log p(y)): two means over the pictures, so a draw needs no more than those.
    sums = [_self_information(side).sum(axis=1) for side in sides]

    def score(side: int, rows: NDArray[np.int64]) -> float:
        return float(np.exp(sums[side][rows].mean() - _self_information(sides[side][rows].mean(axis=0)).sum()))

    draws = [score(1, rows) - score(0, rows) for rows in resampled_indices(len(a), resamples=resamples, seed=seed)]
    return interval_of(classifier_score(b) - classifier_score(a), draws)


def _self_information(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """p log p; a probability that underflowed to 0 contributes 0, its limit."""
    return values * np.log(np.maximum(values, 1e-300))


def _refuse_no_pairs(a: Array, b: Array) -> None:
    if a.shape != b.shape:
        raise InputError(
            f"features of shape {list(a.shape)} and {list(b.shape)} are no pairs; give one row per seed in both"
        )
