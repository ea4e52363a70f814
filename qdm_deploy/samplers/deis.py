"""DEIS (arXiv 2204.13902), the log-rho multistep form of order 1 to 3: a polynomial in ln rho through the last noises.

With rho = noise/signal, the probability-flow ODE is d(x/signal) = eps d(rho). The history holds the predicted noises,
and each is weighted by the integral of its Lagrange polynomial in ln rho over the step. There is no clipping, and a run
ends at the smallest training sigma, not at zero.
"""

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.errors import InputError
from qdm_deploy.samplers.columns import HISTORY, StepColumns, noise_columns
from qdm_deploy.samplers.lagrange import lagrange_integrals
from qdm_deploy.samplers.multistep import SHORT_RUN, multistep_grid
from qdm_deploy.samplers.run_options import RunOptions
from qdm_deploy.samplers.schedule import NoiseSchedule
from qdm_deploy.samplers.sigmas import SigmaGrid

__all__ = ["deis_columns", "pushed_noise"]


def deis_columns(schedule: NoiseSchedule, run: RunOptions) -> StepColumns:
    """Columns of the DEIS sampler.

    Args:
        schedule: Noise levels, spacing, sigma schedule and solver options.
        run: Number of steps, sigma schedule, first step.

    Returns:
        Columns of [S].

    Raises:
        InputError: The config asks for an order above 3 or a zero terminal SNR, or the network predicts the image.
    """
    options = schedule.solver
    schedule.refuse_zero_terminal_snr("deis")
    if options.solver_order > HISTORY:
        raise InputError(
            f"the scheduler config has solver_order={options.solver_order}, and sampler 'deis' knows 1 to 3: change it "
            "in scheduler_config.json"
        )
    own = options.sigma_schedule if run.sigmas is None else run.sigmas
    grid = multistep_grid(schedule, run, final="sigma_min" if own == "spaced" else "last")
    steps = grid.timesteps.size
    here = slice(run.first_step, steps)
    signal, noise = grid.signal[here], grid.noise[here]
    weights = np.zeros((steps - run.first_step, HISTORY))
    for step in range(run.first_step, steps):
        order = _order_of(schedule, step, step - run.first_step, steps)
        weights[step - run.first_step, :order] = _integrals(grid, step, order)
    next_signal = grid.signal[run.first_step + 1 :]
    weights *= next_signal[:, None]
    of_sample, of_output = noise_columns(schedule.prediction_type, signal, noise)
    u, v = pushed_noise(schedule, signal, noise, "deis")
    return StepColumns(
        grid.timesteps[here],
        signal,
        noise,
        a=next_signal / signal + weights[:, 0] * of_sample,
        g=weights[:, 0] * of_output,
        c0=weights[:, 1],
        c1=weights[:, 2],
        u=u,
        v=v,
    )


def pushed_noise(
    schedule: NoiseSchedule, signal: NDArray[np.float64], noise: NDArray[np.float64], sampler: str
) -> tuple[NDArray[np.float64] | float, NDArray[np.float64] | float]:
    """The u and v that push the predicted noise.

    Raises:
        InputError: The network predicts the image, from which the noise cannot be told without x.
    """
    if schedule.prediction_type == "sample":
        raise InputError(
            f"the model predicts the image (prediction_type='sample'), and sampler {sampler!r} remembers predicted "
            "noise; take sampler 'unipc' or 'dpmpp-2m'"
        )
    return (0.0, 1.0) if schedule.prediction_type == "epsilon" else (noise / signal, 1.0 / signal)


def _order_of(schedule: NoiseSchedule, step: int, warm: int, steps: int) -> int:
    left = steps - step if schedule.solver.lower_order_final and steps < SHORT_RUN else HISTORY
    return min(schedule.solver.solver_order, warm + 1, left)


def _integrals(grid: SigmaGrid, step: int, order: int) -> NDArray[np.float64]:
    """Integrals over rho, from this step's to the next, of the Lagrange polynomials in ln rho: [order]."""
    log_rho = -grid.half_log_snr
    # In z = ln(rho/rho_here) the integral of f d(rho) is rho_here times that of f exp(z) dz.
    nodes = log_rho[step - np.arange(order)] - log_rho[step]
    return float(grid.sigmas[step]) * lagrange_integrals(nodes, float(log_rho[step + 1] - log_rho[step]), np.exp)
