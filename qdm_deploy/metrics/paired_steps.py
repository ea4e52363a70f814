"""Errors of B beside A at each denoising step, with intervals over the seeds."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.errors import InputError
from qdm_deploy.metrics.bootstrap import RESAMPLES, Interval, interval_of, resampled_indices
from qdm_deploy.metrics.error import DECIBEL_LIMIT

__all__ = ["SqnrCurve", "StepErrors", "energies", "sqnr_curve"]


@dataclass(frozen=True)
class StepErrors:
    """Energies [N, S] float64 of N seeds at S steps: of A's values, and of B's differences from them."""

    signal: NDArray[np.float64]
    noise: NDArray[np.float64]


@dataclass(frozen=True)
class SqnrCurve:
    """SQNR in dB.

    Attributes:
        steps: of each step, over all seeds together, as a report and ``compare`` have it.
        mean: mean of those over the steps.
        worst: the lowest mean over the steps that one seed has by itself.
    """

    steps: tuple[Interval, ...]
    mean: Interval
    worst: float


def energies(
    references: Iterable[NDArray[np.float32]], values: Iterable[NDArray[np.float32]]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Energy [N, S] of S references [N, ...] and of their differences from the values, summed in float64."""
    signal, noise = [], []
    for reference, value in zip(references, values, strict=True):
        exact = reference.reshape(len(reference), -1).astype(np.float64)
        error = exact - value.reshape(len(value), -1)
        signal.append(np.einsum("nd,nd->n", exact, exact))
        noise.append(np.einsum("nd,nd->n", error, error))
    return np.stack(signal, axis=1), np.stack(noise, axis=1)


def sqnr_curve(errors: StepErrors, *, resamples: int = RESAMPLES, seed: int = 0) -> SqnrCurve:
    """Signal to noise at each step; the same draws of seeds serve every step, and every curve of equally many seeds.

    Raises:
        InputError: energies that do not fit each other, or fewer than two seeds.
    """
    if errors.signal.shape != errors.noise.shape or errors.signal.ndim != 2 or errors.signal.size == 0:
        raise InputError(
            f"energies of shape {list(errors.signal.shape)} and {list(errors.noise.shape)} are no errors per step; "
            "give [seeds, steps] of both"
        )
    exact = _decibels(errors.signal.sum(axis=0), errors.noise.sum(axis=0))
    draws = np.stack([
        _decibels(errors.signal[rows].sum(axis=0), errors.noise[rows].sum(axis=0))
        for rows in resampled_indices(len(errors.signal), resamples=resamples, seed=seed)
    ])  # fmt: skip
    return SqnrCurve(
        steps=tuple(interval_of(value, column) for value, column in zip(exact.tolist(), draws.T, strict=True)),
        mean=interval_of(float(exact.mean()), draws.mean(axis=1)),
        worst=float(_decibels(errors.signal, errors.noise).mean(axis=1).min()),
    )


def _decibels(signal: NDArray[np.float64], noise: NDArray[np.float64]) -> NDArray[np.float64]:
    """10 log10(signal / noise), limited as ``metrics`` limits it; no noise is the upper limit."""
    tiny = np.finfo(np.float64).tiny
    ratio = 10.0 * (np.log10(np.maximum(signal, tiny)) - np.log10(np.maximum(noise, tiny)))
    result: NDArray[np.float64] = np.where(noise == 0.0, DECIBEL_LIMIT, np.clip(ratio, -DECIBEL_LIMIT, DECIBEL_LIMIT))
    return result
