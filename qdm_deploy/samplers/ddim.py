"""DDIM (arXiv 2010.02502, eq. 12 and 16), deterministic at eta 0 and ancestral at eta 1.

The noise that points back to x_t is the network's own prediction, also where x0 was clipped, as in ``DDIMScheduler``.
With ``use_clipped_model_output`` it is derived anew from the clipped x0, eps = (x - signal*x0)/noise, as GLIDE and
guided-diffusion do: x_t then stays on the line between the clipped image and its noise. Without clipping the two agree.

A step goes down by T // S timesteps whatever the spacing, because diffusers does so; with linspace, and with trailing
where S does not divide T, the level that a step arrives at is therefore not quite that of the next timestep.
"""

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.samplers.columns import NO_CLIP, StepColumns, levels_of, noise_columns
from qdm_deploy.samplers.run_options import RunOptions
from qdm_deploy.samplers.schedule import NoiseSchedule
from qdm_deploy.samplers.spacing import spaced_timesteps

__all__ = ["ddim_columns"]


def ddim_columns(schedule: NoiseSchedule, run: RunOptions) -> StepColumns:
    """Columns of the DDIM sampler.

    Args:
        schedule: Noise levels, clipping, and where the last step ends (``set_alpha_to_one``, by default true).
        run: Number of steps, eta and ``use_clipped_model_output``.

    Returns:
        Columns of [S].
    """
    timesteps = spaced_timesteps(schedule, run.steps)
    level = schedule.alphas_cumprod[timesteps]
    next_timesteps = timesteps - schedule.num_train_timesteps // run.steps
    final = schedule.alphas_cumprod[0] if schedule.set_alpha_to_one is False else 1.0
    next_level = np.where(next_timesteps >= 0, schedule.alphas_cumprod[next_timesteps], final)
    direction, d = _direction_and_noise(level, next_level, run.eta)
    signal, noise = np.sqrt(level), np.sqrt(1.0 - level)
    a, b, g = direction / noise, np.sqrt(next_level) - direction * signal / noise, np.zeros_like(level)
    if not run.use_clipped_model_output:
        of_sample, of_output = noise_columns(schedule.prediction_type, signal, noise)
        a, b, g = direction * of_sample, np.sqrt(next_level), direction * of_output
    clip = schedule.clip_sample_range if schedule.clip_sample else NO_CLIP
    return StepColumns(*levels_of(timesteps, level), clip=clip, a=a, b=b, g=g, d=d)


def _direction_and_noise(
    level: NDArray[np.float64], next_level: NDArray[np.float64], eta: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """How much predicted and how much fresh noise ``next_level`` holds (eq. 12 and 16)."""
    share = eta**2 * (1.0 - level / next_level) / (1.0 - level)
    # Factored, so that the variance that is left over can never be a rounding error below zero.
    return np.sqrt((1.0 - next_level) * (1.0 - share)), np.sqrt((1.0 - next_level) * share)
