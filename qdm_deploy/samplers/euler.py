"""The Euler sampler (arXiv 2206.00364, algorithm 1 without churn), in variance-preserving coordinates.

diffusers keeps x / sqrt(level), with sigma = sqrt((1 - level)/level), and hands the network x back. In the network's
own coordinates the Euler step from one sigma to the next is the deterministic DDIM update between the levels of
neighbouring timesteps, so no rescaling is needed. There is no clipping.

Two things differ from diffusers. Timesteps are whole numbers: linspace spacing is rounded and sigma is that of the
rounded timestep, where diffusers interpolates between two. And a run starts at unit noise for every spacing; for
linspace and trailing diffusers starts at sigma/sqrt(sigma**2 + 1) of it (0.2 % less for Stable Diffusion).
"""

import numpy as np

from qdm_deploy.samplers.columns import NO_CLIP, StepColumns
from qdm_deploy.samplers.ddim import ddim_update
from qdm_deploy.samplers.schedule import NoiseSchedule
from qdm_deploy.samplers.spacing import spaced_timesteps

__all__ = ["euler_columns"]

_OPTIONS = (
    "final_sigmas_type",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "interpolation_type",
    "timestep_type",
)


def euler_columns(schedule: NoiseSchedule, steps: int) -> StepColumns:
    """Columns of the Euler sampler; its last step ends at sigma 0.

    Args:
        schedule: Noise levels and spacing.
        steps: Number of steps S.

    Returns:
        Columns of [S].

    Raises:
        InputError: The config asks for another grid of sigmas (Karras, exponential, beta, log-linear, continuous).
    """
    schedule.refuse_solver_options("euler", _OPTIONS)
    timesteps = spaced_timesteps(schedule, steps)
    level = schedule.positive_alphas_cumprod()[timesteps]
    a, b, d = ddim_update(level, np.append(level[1:], 1.0), 0.0)
    zeros = np.zeros(steps)
    return StepColumns(timesteps, level, clip=NO_CLIP, a=a, b=b, c=zeros, d=d, log_var_min=zeros, log_var_max=zeros)
