"""Which steps of the sampler the calibration set is drawn from.

``uniform`` takes every c-th step with the same number of samples each (Q-Diffusion, section 4.1, with its x_t from the
full-precision sampler). ``ndtc`` draws steps from a normal distribution over the timestep (PTQ4DM, section 3.3); the
mean and the spread are fractions of T, since the paper's text (sqrt(T/2)) and its script (0.4 T) differ tenfold. The
script also stores each sample under a time-reversed label; here a sample keeps the timestep it was met at.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.artifacts.recipe import SamplingPlan
from qdm_deploy.samplers import StepTable

__all__ = ["Draw", "SamplingPlan", "sampling_plan"]


@dataclass(frozen=True)
class Draw:
    """Rows to keep: trajectory ``sample[i]`` at sampler step ``step[i]``, in the order of the steps."""

    sample: NDArray[np.int64]
    step: NDArray[np.int64]


def sampling_plan(plan: SamplingPlan, table: StepTable, num_train_timesteps: int, seed: int) -> Draw:
    """Choose (trajectory, step) pairs; seeded, and every trajectory is used equally often."""
    total = len(table.timesteps)
    if plan.strategy == "uniform":
        stride = max(1, total // plan.steps)
        chosen = np.arange(0, total, stride, dtype=np.int64)
        if chosen[-1] != total - 1:
            # The last steps are the most sensitive ones; a stride that stops short of them would leave them
            # uncalibrated.
            chosen = np.append(chosen, total - 1)
        step = np.repeat(chosen, plan.samples)
        sample = np.tile(np.arange(plan.samples, dtype=np.int64), len(chosen))
        return Draw(sample, step)
    generator = np.random.Generator(np.random.Philox(key=seed))
    wanted = generator.normal(plan.mean * num_train_timesteps, plan.spread * num_train_timesteps, plan.count)
    wanted = np.clip(np.floor(wanted), 0, num_train_timesteps - 1)
    step = np.abs(table.timesteps[None, :] - wanted[:, None]).argmin(axis=1).astype(np.int64)
    sample = np.arange(plan.count, dtype=np.int64) % plan.samples
    order = np.lexsort((sample, step))
    return Draw(sample[order], step[order])
