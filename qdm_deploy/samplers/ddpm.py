"""DDPM ancestral sampling over any subset of timesteps (arXiv 2006.11239, eq. 7).

Between neighbouring timesteps of the table, alpha = ratio of their signal levels takes the place of one training
step's alpha. As in diffusers, noise is left out at timestep 0 only: with a spacing that ends above it (trailing, or a
steps_offset), ``fixed_large`` and ``learned_range`` still add noise in the last step, and ``fixed_small`` adds none
because its variance is zero there.
"""

import numpy as np

from qdm_deploy.errors import InputError
from qdm_deploy.samplers.columns import NO_CLIP, StepColumns, levels_of
from qdm_deploy.samplers.run_options import RunOptions
from qdm_deploy.samplers.schedule import NoiseSchedule
from qdm_deploy.samplers.spacing import given_timesteps, spaced_timesteps

__all__ = ["ddpm_columns"]

# The posterior variance of the last step is zero; its logarithm must stay finite (the value is that of diffusers).
_SMALLEST_VARIANCE = 1e-20


def ddpm_columns(schedule: NoiseSchedule, run: RunOptions) -> StepColumns:
    """Columns of the ancestral sampler.

    Args:
        schedule: Noise levels, clipping and variance type.
        run: Number of steps or listed timesteps. With ``learned_variance`` the model has 2C output channels; with
            ``variance_type='learned_range'`` the second half interpolates the log-variance (Improved DDPM, arXiv
            2102.09672, eq. 15), with a fixed type it is ignored.

    Returns:
        Columns of [S].

    Raises:
        InputError: ``variance_type`` is 'learned' or 'fixed_large_log', or is 'learned_range' for a model without
            learned variance.
    """
    variance_type = schedule.variance_type
    if variance_type in ("learned", "fixed_large_log"):
        raise InputError(
            f"variance_type={variance_type!r} is not supported by sampler 'ddpm'; known are fixed_small, "
            "fixed_small_log, fixed_large, learned_range: change it in scheduler_config.json, or take sampler 'ddim'"
        )
    if variance_type == "learned_range" and not run.learned_variance:
        raise InputError(
            "variance_type='learned_range' needs a model with twice as many output as input channels, and this one has "
            "no learned variance; set variance_type to 'fixed_small' or 'fixed_large' in scheduler_config.json"
        )
    if run.timesteps is None:
        timesteps = spaced_timesteps(schedule, run.steps)
    else:
        timesteps = given_timesteps(schedule, run.timesteps, whole=True).astype(np.int64)
    level = schedule.alphas_cumprod[timesteps]
    next_level = np.append(level[1:], 1.0)
    alpha = level / next_level
    beta = 1.0 - alpha
    posterior_variance = (1.0 - next_level) / (1.0 - level) * beta
    noisy = (timesteps > 0).astype(np.float64)
    log_var_min, log_var_max = np.zeros_like(level), np.zeros_like(level)
    if variance_type == "learned_range":
        std = noisy
        log_var_min, log_var_max = np.log(np.maximum(posterior_variance, _SMALLEST_VARIANCE)), np.log(beta)
    else:
        std = noisy * np.sqrt(beta if variance_type == "fixed_large" else posterior_variance)
    return StepColumns(
        *levels_of(timesteps, level),
        clip=schedule.clip_sample_range if schedule.clip_sample else NO_CLIP,
        a=np.sqrt(alpha) * (1.0 - next_level) / (1.0 - level),
        b=np.sqrt(next_level) * beta / (1.0 - level),
        d=std,
        log_var_min=log_var_min,
        log_var_max=log_var_max,
    )
