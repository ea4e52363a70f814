"""DPM-Solver++(2M): second-order multistep in the half-log-SNR lambda (arXiv 2211.01095, algorithm 2, midpoint).

With alpha = sqrt(level), sigma = sqrt(1 - level), lambda = ln(alpha/sigma), h = lambda' - lambda and r = h_previous/h:

    D = (1 + 1/(2r)) x0 - 1/(2r) previous_x0         (first step: D = x0)
    x' = (sigma'/sigma) x + alpha' (1 - exp(-h)) D

The last step ends at sigma 0, where h is infinite and 1/(2r) with it, so it is first-order: x' = x0. This is also why
``lower_order_final`` (for fewer than 15 steps) changes nothing here. There is no clipping.
"""

import numpy as np

from qdm_deploy.samplers.columns import NO_CLIP, StepColumns
from qdm_deploy.samplers.schedule import NoiseSchedule
from qdm_deploy.samplers.spacing import multistep_timesteps

__all__ = ["dpmpp_2m_columns"]

_OPTIONS = (
    "algorithm_type",
    "solver_order",
    "solver_type",
    "lambda_min_clipped",
    "use_lu_lambdas",
    "use_flow_sigmas",
    "final_sigmas_type",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
)


def dpmpp_2m_columns(schedule: NoiseSchedule, steps: int) -> StepColumns:
    """Columns of the second-order multistep sampler.

    Args:
        schedule: Noise levels and spacing.
        steps: Number of steps S.

    Returns:
        Columns of [S]; ``c`` is zero in the first and the last step.

    Raises:
        InputError: The config asks for another DPM-Solver (algorithm, order, grid of sigmas, final sigma).
    """
    schedule.refuse_solver_options("dpmpp-2m", _OPTIONS)
    timesteps = multistep_timesteps(schedule, steps)
    level = schedule.positive_alphas_cumprod()[timesteps]
    alpha, sigma = np.sqrt(level), np.sqrt(1.0 - level)
    h = np.diff(np.log(alpha / sigma))
    gain = np.append(-alpha[1:] * np.expm1(-h), 1.0)
    extrapolation = np.zeros(steps)
    extrapolation[1:-1] = h[1:] / (2.0 * h[:-1])
    zeros = np.zeros(steps)
    return StepColumns(
        timesteps=timesteps,
        alphas_cumprod=level,
        clip=NO_CLIP,
        a=np.append(sigma[1:], 0.0) / sigma,
        b=gain * (1.0 + extrapolation),
        c=-gain * extrapolation,
        d=zeros,
        log_var_min=zeros,
        log_var_max=zeros,
    )
