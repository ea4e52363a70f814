"""The linear multistep sampler of k-diffusion (order 4): a polynomial in sigma through the last four noises.

With y = x/signal, the probability-flow ODE is dy = eps d(sigma). The history holds the predicted noises, and each is
weighted by the integral of its Lagrange polynomial in sigma over the step. There is no clipping.
"""

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.errors import InputError
from qdm_deploy.samplers.columns import HISTORY, StepColumns, noise_columns
from qdm_deploy.samplers.deis import pushed_noise
from qdm_deploy.samplers.euler import sigma_start
from qdm_deploy.samplers.lagrange import lagrange_integrals
from qdm_deploy.samplers.run_options import RunOptions
from qdm_deploy.samplers.schedule import NoiseSchedule
from qdm_deploy.samplers.sigmas import SigmaGrid, chosen_schedule, euler_grid

__all__ = ["lms_columns"]

_ORDER = HISTORY + 1


def lms_columns(schedule: NoiseSchedule, run: RunOptions) -> StepColumns:
    """Columns of the linear multistep sampler.

    Args:
        schedule: Noise levels, spacing and sigma schedule.
        run: Number of steps, sigma schedule.

    Returns:
        Columns of [S].

    Raises:
        InputError: The config asks for a zero terminal SNR, the network predicts the image, or the run starts in the
            middle, where diffusers weights noises that it does not have.
    """
    schedule.refuse_zero_terminal_snr("lms")
    if run.first_step > 0:
        raise InputError(
            f"sampler 'lms' cannot start at step {run.first_step} of a run; take sampler 'euler' or 'dpmpp-2m'"
        )
    grid = euler_grid(schedule, run, kind=chosen_schedule(schedule, run), final=0.0, bounded=False, log_linear=False)
    signal, noise, next_signal = grid.signal[:-1], grid.noise[:-1], grid.signal[1:]
    weights = next_signal[:, None] * np.array([_integrals(grid, step) for step in range(grid.timesteps.size)])
    of_sample, of_output = noise_columns(schedule.prediction_type, signal, noise)
    u, v = pushed_noise(schedule, signal, noise, "lms")
    return StepColumns(
        grid.timesteps,
        signal,
        noise,
        initial_scale=sigma_start(schedule, grid),
        a=next_signal / signal + weights[:, 0] * of_sample,
        g=weights[:, 0] * of_output,
        c0=weights[:, 1],
        c1=weights[:, 2],
        c2=weights[:, 3],
        u=u,
        v=v,
    )


def _integrals(grid: SigmaGrid, step: int) -> NDArray[np.float64]:
    """Integrals over sigma, from this step's to the next, of the Lagrange polynomials: [4], zero beyond the start."""
    order = min(step + 1, _ORDER)
    result = np.zeros(_ORDER)
    nodes = grid.sigmas[step - np.arange(order)] - grid.sigmas[step]
    result[:order] = lagrange_integrals(nodes, float(grid.sigmas[step + 1] - grid.sigmas[step]))
    return result
