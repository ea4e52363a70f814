"""Which training timesteps a run of S steps visits.

The three spacings are those of "Common Diffusion Noise Schedules and Sample Steps are Flawed" (arXiv 2305.08891,
table 2), rounded as diffusers rounds them. The multistep solvers have their own grid for two of them: it lays S + 1
points and leaves out the one at the clean end. Consistency models visit a subset of the timesteps of their teacher.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.errors import InputError
from qdm_deploy.samplers.schedule import NoiseSchedule

__all__ = [
    "consistency_timesteps",
    "fractional_timesteps",
    "given_timesteps",
    "multistep_timesteps",
    "spaced_timesteps",
]


def spaced_timesteps(schedule: NoiseSchedule, steps: int) -> NDArray[np.int64]:
    """Timesteps of the DDPM, DDIM and PNDM samplers.

    Args:
        schedule: Gives the spacing, the offset and the number of training timesteps T.
        steps: Number of steps S, 1 .. T.

    Returns:
        [S] int64, strictly falling.

    Raises:
        InputError: The grid leaves 0 .. T - 1 or visits a timestep twice.
    """
    return _checked(_spaced(schedule, steps).round(), schedule, steps).astype(np.int64)


def fractional_timesteps(schedule: NoiseSchedule, steps: int) -> NDArray[np.float64]:
    """Timesteps of the Euler and LMS samplers: as ``spaced_timesteps``, but linspace is not rounded; float32 values."""
    return _checked(_spaced(schedule, steps).astype(np.float32).astype(np.float64), schedule, steps)


def multistep_timesteps(schedule: NoiseSchedule, steps: int, reachable: int | None = None) -> NDArray[np.int64]:
    """Timesteps of the DPM-Solver++, UniPC and DEIS samplers; arguments, result and errors as for ``spaced_timesteps``.

    ``reachable`` limits the run to the first so many timesteps; trailing spacing then visits fewer than S of them.
    """
    total = schedule.num_train_timesteps
    reachable = total if reachable is None else reachable
    if schedule.timestep_spacing == "linspace":
        grid = np.linspace(0, reachable - 1, steps + 1).round()[:0:-1]
    elif schedule.timestep_spacing == "leading":
        grid = np.arange(1, steps + 1, dtype=np.float64)[::-1] * (reachable // (steps + 1)) + schedule.steps_offset
    else:
        grid = _trailing(reachable, total / steps, steps)
    return _checked(grid, schedule, steps).astype(np.int64)


def consistency_timesteps(
    schedule: NoiseSchedule, steps: int, teacher_timesteps: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Timesteps of the LCM and TCD samplers: evenly spaced picks from those the model was distilled on.

    Args:
        schedule: Gives the number of training timesteps.
        steps: Number of steps S.
        teacher_timesteps: [K] int64, rising.

    Returns:
        [S] int64, strictly falling.

    Raises:
        InputError: S is greater than K.

    Source: Latent Consistency Models (arXiv 2310.04378), section 4.3.
    """
    if steps > teacher_timesteps.size:
        raise InputError(
            f"{steps} steps were asked for, but the model was distilled on {teacher_timesteps.size} timesteps "
            "(original_inference_steps); take fewer steps"
        )
    picks = np.floor(np.linspace(0, teacher_timesteps.size, steps, endpoint=False)).astype(np.int64)
    return _checked(teacher_timesteps[::-1][picks].astype(np.float64), schedule, steps).astype(np.int64)


def given_timesteps(schedule: NoiseSchedule, timesteps: Sequence[float], *, whole: bool) -> NDArray[np.float64]:
    """Timesteps that the caller listed.

    Args:
        schedule: Gives the number of training timesteps T.
        timesteps: S values, falling.
        whole: Only whole numbers are allowed.

    Returns:
        [S] float64.

    Raises:
        InputError: They do not fall strictly, leave 0 .. T - 1, or are not whole where they must be.
    """
    listed = np.asarray(timesteps, dtype=np.float64)
    last = schedule.num_train_timesteps - 1
    if not (listed.min() >= 0.0 and listed.max() <= last and np.all(np.diff(listed) < 0)):
        raise InputError(f"timesteps={list(timesteps)} must fall strictly and lie in 0 .. {last}")
    if whole and np.any(listed != listed.round()):
        raise InputError(f"timesteps={list(timesteps)} must be whole numbers for this sampler")
    return listed


def _spaced(schedule: NoiseSchedule, steps: int) -> NDArray[np.float64]:
    total = schedule.num_train_timesteps
    if schedule.timestep_spacing == "linspace":
        return np.linspace(0, total - 1, steps)[::-1]
    if schedule.timestep_spacing == "leading":
        return np.arange(steps, dtype=np.float64)[::-1] * (total // steps) + schedule.steps_offset
    return _trailing(total, total / steps, steps)


def _trailing(first: int, stride: float, steps: int) -> NDArray[np.float64]:
    # For some S the float step makes arange one element too long, and its last timestep would be -1.
    return np.arange(first, 0, -stride).round()[:steps] - 1.0


def _checked(timesteps: NDArray[np.float64], schedule: NoiseSchedule, steps: int) -> NDArray[np.float64]:
    last = schedule.num_train_timesteps - 1
    if timesteps[0] > last:
        raise InputError(
            f"{steps} steps with steps_offset={schedule.steps_offset} start at timestep {timesteps[0]:g}, but the last "
            f"one is {last}; take fewer steps or a smaller steps_offset"
        )
    if np.any(np.diff(timesteps) >= 0):
        raise InputError(
            f"{steps} steps with {schedule.timestep_spacing!r} spacing visit a timestep twice (this sampler needs one "
            f"grid point more than steps, and there are {last + 1} timesteps); take fewer steps"
        )
    return timesteps
