"""DDIM (arXiv 2010.02502, eq. 12 and 16), deterministic at eta 0 and ancestral at eta 1.

The noise that points back to x_t is re-derived from x0 *after* clipping, eps = (x - sqrt(level)*x0)/sqrt(1 - level),
as GLIDE and guided-diffusion do and as ``DDIMScheduler.step(use_clipped_model_output=True)`` does: x_t then stays on
the line between the clipped image and its noise. Without clipping this is the predicted noise itself. (The default of
diffusers keeps the unclipped prediction, which the two-stage step graph cannot express.)

A step goes down by T // S timesteps whatever the spacing, because diffusers does so; with linspace, and with trailing
where S does not divide T, the level that a step arrives at is therefore not quite that of the next timestep.
"""

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.samplers.columns import NO_CLIP, StepColumns
from qdm_deploy.samplers.schedule import NoiseSchedule
from qdm_deploy.samplers.spacing import spaced_timesteps

__all__ = ["ddim_columns", "ddim_update"]


def ddim_columns(schedule: NoiseSchedule, steps: int, *, eta: float) -> StepColumns:
    """Columns of the DDIM sampler.

    Args:
        schedule: Noise levels, clipping, and where the last step ends (``set_alpha_to_one``).
        steps: Number of steps S.
        eta: Share of the ancestral noise, 0 .. 1.

    Returns:
        Columns of [S].
    """
    timesteps = spaced_timesteps(schedule, steps)
    level = schedule.alphas_cumprod[timesteps]
    next_timesteps = timesteps - schedule.num_train_timesteps // steps
    final = 1.0 if schedule.set_alpha_to_one else schedule.alphas_cumprod[0]
    next_level = np.where(next_timesteps >= 0, schedule.alphas_cumprod[next_timesteps], final)
    a, b, d = ddim_update(level, next_level, eta)
    zeros = np.zeros(steps)
    return StepColumns(
        timesteps=timesteps,
        alphas_cumprod=level,
        clip=schedule.clip_sample_range if schedule.clip_sample else NO_CLIP,
        a=a,
        b=b,
        c=zeros,
        d=d,
        log_var_min=zeros,
        log_var_max=zeros,
    )


def ddim_update(
    level: NDArray[np.float64], next_level: NDArray[np.float64], eta: float
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """The a, b and d that take x at signal level ``level`` to ``next_level``.

    Args:
        level: [S] float64, below 1.
        next_level: [S] float64, at least ``level`` and at most 1.
        eta: Share of the ancestral noise, 0 .. 1.

    Returns:
        a, b, d, each [S] float64.

    Source: DDIM (arXiv 2010.02502) eq. 12, with eps written as (x - sqrt(level)*x0)/sqrt(1 - level).
    """
    share = eta**2 * (1.0 - level / next_level) / (1.0 - level)
    # Factored, so that the variance that is left over can never be a rounding error below zero.
    direction = np.sqrt((1.0 - next_level) * (1.0 - share))
    a = direction / np.sqrt(1.0 - level)
    return a, np.sqrt(next_level) - a * np.sqrt(level), np.sqrt((1.0 - next_level) * share)
