"""Rows of a calibration set: which to take where not all are needed, and running them through a network."""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qdm_deploy.artifacts.calibration_set import CalibrationSet

__all__ = ["chosen_rows", "in_batches", "run_rows"]


def chosen_rows(
    timesteps: NDArray[np.int64], count: int, seed: int = 0, *, last_step: bool = False
) -> NDArray[np.int64]:
    """At most ``count`` row indices, evenly over the timesteps and at random within each stretch of them.

    With ``last_step`` the first is a row of the lowest timestep.
    """
    order = np.argsort(timesteps, kind="stable")
    if count >= len(order):
        return order
    # A fixed stride could meet the same trajectories, and so the same classes, at every step.
    generator = np.random.default_rng(seed)
    parts = np.array_split(order, count)
    if last_step:
        parts[0] = order[timesteps[order] == timesteps.min()]
    return np.array([generator.choice(part) for part in parts], dtype=np.int64)


def in_batches(rows: NDArray[np.int64], size: int) -> Iterator[NDArray[np.int64]]:
    """The rows, at most ``size`` at a time."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def run_rows(network: nn.Module, calibration: CalibrationSet, rows: NDArray[np.int64]) -> Tensor:
    """Output of ``network``, which takes (sample, timestep, **conditioning), for those rows."""
    output: Tensor = network(
        torch.from_numpy(calibration.sample[rows]),
        torch.from_numpy(calibration.timestep[rows]),
        **{name: torch.from_numpy(values[rows]) for name, values in calibration.conditioning.items()},
    )
    return output
