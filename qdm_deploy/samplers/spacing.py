"""Which training timesteps a run of S steps visits.

The three spacings are those of "Common Diffusion Noise Schedules and Sample Steps are Flawed" (arXiv 2305.08891,
table 2), rounded as diffusers rounds them. The multistep solver has its own grid for two of them: it lays S + 1 points
and leaves out the one at the clean end.
"""

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.errors import InputError
from qdm_deploy.samplers.schedule import NoiseSchedule

__all__ = ["multistep_timesteps", "spaced_timesteps"]


def spaced_timesteps(schedule: NoiseSchedule, steps: int) -> NDArray[np.int64]:
    """Timesteps of the DDPM, DDIM and Euler samplers.

    Args:
        schedule: Gives the spacing, the offset and the number of training timesteps T.
        steps: Number of steps S, 1 .. T.

    Returns:
        [S] int64, strictly falling.

    Raises:
        InputError: The grid leaves 0 .. T - 1 or visits a timestep twice.
    """
    total = schedule.num_train_timesteps
    if schedule.timestep_spacing == "linspace":
        grid = np.linspace(0, total - 1, steps).round()[::-1]
    elif schedule.timestep_spacing == "leading":
        grid = np.arange(steps, dtype=np.float64)[::-1] * (total // steps) + schedule.steps_offset
    else:
        grid = _trailing(total, steps)
    return _checked(grid.astype(np.int64), schedule, steps)


def multistep_timesteps(schedule: NoiseSchedule, steps: int) -> NDArray[np.int64]:
    """Timesteps of the DPM-Solver++ sampler; arguments, result and errors as for ``spaced_timesteps``."""
    total = schedule.num_train_timesteps
    if schedule.timestep_spacing == "linspace":
        grid = np.linspace(0, total - 1, steps + 1).round()[:0:-1]
    elif schedule.timestep_spacing == "leading":
        grid = np.arange(1, steps + 1, dtype=np.float64)[::-1] * (total // (steps + 1)) + schedule.steps_offset
    else:
        grid = _trailing(total, steps)
    return _checked(grid.astype(np.int64), schedule, steps)


def _trailing(total: int, steps: int) -> NDArray[np.float64]:
    # For some S the float step makes arange one element too long, and its last timestep would be -1.
    return np.arange(total, 0, -total / steps).round()[:steps] - 1.0


def _checked(timesteps: NDArray[np.int64], schedule: NoiseSchedule, steps: int) -> NDArray[np.int64]:
    last = schedule.num_train_timesteps - 1
    if timesteps[0] > last:
        raise InputError(
            f"{steps} steps with steps_offset={schedule.steps_offset} start at timestep {timesteps[0]}, but the last "
            f"one is {last}; take fewer steps or a smaller steps_offset"
        )
    if np.any(np.diff(timesteps) >= 0):
        raise InputError(
            f"{steps} steps with {schedule.timestep_spacing!r} spacing visit a timestep twice (this sampler needs one "
            f"grid point more than steps, and there are {last + 1} timesteps); take fewer steps"
        )
    return timesteps
