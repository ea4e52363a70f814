"""DPM-Solver++ (arXiv 2211.01095), multistep of order 2 and 3, as an ODE and as an SDE.

With alpha and sigma the signal and the noise of x, lambda = ln(alpha/sigma), h = lambda' - lambda, r0 and r1 the
lengths of the two steps before in units of h, and m0, m1, m2 the x0 of this step and of those before:

    D1_0 = (m0 - m1)/r0      D1_1 = (m1 - m2)/r1
    D1   = D1_0              D1   = D1_0 + r0/(r0 + r1) (D1_0 - D1_1), D2 = (D1_0 - D1_1)/(r0 + r1)    at order 3
    x'   = (sigma'/sigma) x + alpha' (1 - exp(-h)) m0 + ...             the ODE
    x'   = (sigma'/sigma) exp(-h) x + alpha' (1 - exp(-2h)) m0 + ... + sigma' sqrt(1 - exp(-2h)) noise   the SDE

A run warms up through the lower orders. A last step that ends at sigma 0, where h is infinite, is first-order:
x' = m0. There is no clipping.
"""

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.samplers.columns import StepColumns
from qdm_deploy.samplers.multistep import SHORT_RUN, multistep_grid
from qdm_deploy.samplers.run_options import RunOptions
from qdm_deploy.samplers.schedule import NoiseSchedule
from qdm_deploy.samplers.scheduler_config import SigmaSchedule
from qdm_deploy.samplers.sigmas import SigmaGrid, training_sigmas

__all__ = ["dpmpp_columns"]


def dpmpp_columns(schedule: NoiseSchedule, run: RunOptions, *, order: int, stochastic: bool) -> StepColumns:
    """Columns of a DPM-Solver++ sampler.

    Args:
        schedule: Noise levels, spacing, sigma schedule and solver options.
        run: Number of steps, listed timesteps, sigma schedule, first step.
        order: 2 or 3.
        stochastic: The SDE instead of the ODE.

    Returns:
        Columns of [S].

    Raises:
        InputError: The spacing or what was listed cannot be used.
    """
    options = schedule.solver
    lu_lambdas = options.use_lu_lambdas and run.sigmas is None and run.timesteps is None
    rounded: tuple[SigmaSchedule | Literal["lu"], ...] = ("karras", "lu")
    grid = multistep_grid(
        schedule,
        run,
        final=options.final_sigmas_type,
        reachable=_reachable(schedule),
        rounded=() if options.beta_schedule == "squaredcos_cap_v2" else rounded,
        lu_lambdas=lu_lambdas,
    )
    steps = grid.timesteps.size
    rows = np.array(
        [
            _row(grid, step, _order_of(schedule, grid, step, step - run.first_step, order), stochastic, _heun(schedule))
            for step in range(run.first_step, steps)
        ]
    ).reshape(-1, 5)
    here = slice(run.first_step, steps)
    a, b, c0, c1, d = rows.T
    return StepColumns(grid.timesteps[here], grid.signal[here], grid.noise[here], a=a, b=b, c0=c0, c1=c1, d=d)


def _reachable(schedule: NoiseSchedule) -> int:
    """How many training timesteps have a lambda of at least ``lambda_min_clipped``."""
    half_log_snr = -np.log(training_sigmas(schedule))
    return int(np.count_nonzero(half_log_snr >= schedule.solver.lambda_min_clipped))


def _heun(schedule: NoiseSchedule) -> bool:
    # The names of other solvers mean midpoint, as in diffusers.
    return schedule.solver.solver_type == "heun"


def _order_of(schedule: NoiseSchedule, grid: SigmaGrid, step: int, warm: int, order: int) -> int:
    options, steps = schedule.solver, grid.timesteps.size
    short = options.lower_order_final and steps < SHORT_RUN
    if step == steps - 1 and (options.euler_at_final or short or grid.sigmas[-1] == 0.0):
        return 1
    return min(order, warm + 1, 2 if step == steps - 2 and short else 3)


def _row(grid: SigmaGrid, step: int, order: int, stochastic: bool, heun: bool) -> tuple[float, ...]:
    """The factors of x, m0, m1, m2 and noise in one step."""
    half_log_snr = grid.half_log_snr
    h = half_log_snr[step + 1] - half_log_snr[step]
    if h == 0.0:
        return 1.0, 0.0, 0.0, 0.0, 0.0
    next_signal, next_noise = grid.signal[step + 1], grid.noise[step + 1]
    # The SDE integrates over twice the length.
    length = 2.0 * h if stochastic else h
    decay = math.expm1(-length)
    rest = _differences(half_log_snr, step, order, h)
    factors = -next_signal * decay * np.array([1.0, 0.0, 0.0])
    if order > 1:
        second = next_signal * (decay / length + 1.0) if heun or order == 3 else -0.5 * next_signal * decay
        factors += second * rest[0]
    if order == 3:
        # k-diffusion subtracts the half in the SDE too; diffusers adds it there, and this sampler is diffusers'.
        third = next_signal * ((decay + length) / length**2 + (0.5 if stochastic else -0.5))
        factors -= third * rest[1]
    kept = next_noise / grid.noise[step] * (math.exp(-h) if stochastic else 1.0)
    fresh = next_noise * math.sqrt(-decay) if stochastic else 0.0
    return kept, factors[0], factors[1], factors[2], fresh


def _differences(half_log_snr: NDArray[np.float64], step: int, order: int, h: float) -> NDArray[np.float64]:
    """D1 and D2 as factors of m0, m1 and m2: [2, 3]."""
    if order == 1:
        return np.zeros((2, 3))
    r0 = (half_log_snr[step] - half_log_snr[step - 1]) / h
    newer = np.array([1.0, -1.0, 0.0]) / r0
    if order == 2:
        return np.stack([newer, np.zeros(3)])
    r1 = (half_log_snr[step - 1] - half_log_snr[step - 2]) / h
    change = newer - np.array([0.0, 1.0, -1.0]) / r1
    return np.stack([newer + r0 / (r0 + r1) * change, change / (r0 + r1)])
