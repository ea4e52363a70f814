"""How sure a mean over seeds is: percentile bootstrap (Efron and Tibshirani 1993, chapter 13)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.errors import InputError

__all__ = ["RESAMPLES", "Interval", "interval_of", "mean_interval", "resampled_indices"]

RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % bootstrap interval, all in the unit of the estimate."""

    value: float
    low: float
    high: float

    @property
    def holds_zero(self) -> bool:
        """Whether zero is a value that the data allow: then a difference is not distinguishable from none."""
        return self.low <= 0.0 <= self.high


def resampled_indices(count: int, *, resamples: int = RESAMPLES, seed: int = 0) -> Iterator[NDArray[np.int64]]:
    """Index vectors [count], drawn with replacement; equal arguments give equal vectors.

    Paired quantities stay paired when both are indexed by the same vector.

    Raises:
        InputError: fewer than two things to draw from, or no resamples.
    """
    if count < 2 or resamples < 1:
        raise InputError(
            f"{resamples} resamples of {count} values give no interval; at least 1 resample of 2 values is needed"
        )
    generator = np.random.default_rng(seed)
    return (generator.integers(0, count, count) for _ in range(resamples))


def interval_of(value: float, draws: Sequence[float] | NDArray[np.float64]) -> Interval:
    """The 2.5 and 97.5 percentiles of a statistic's bootstrap draws, with the statistic itself."""
    low, high = np.percentile(np.asarray(draws, dtype=np.float64), [2.5, 97.5])
    return Interval(float(value), float(low), float(high))


def mean_interval(values: Sequence[float], *, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Mean of one value per seed.

    Raises:
        InputError: fewer than two values, NaN or infinity.
    """
    exact = np.asarray(values, dtype=np.float64)
    if not np.isfinite(exact).all():
        raise InputError(f"{np.count_nonzero(~np.isfinite(exact))} of {exact.size} values are NaN or infinite")
    draws = [float(exact[rows].mean()) for rows in resampled_indices(exact.size, resamples=resamples, seed=seed)]
    return interval_of(float(exact.mean()), draws)
