"""UniPC (arXiv 2302.04867), the unified predictor-corrector of order 1 to 3 in its B(h) forms, on predicted x0.

A step first corrects the sample it is given, now that the network has seen it, and then predicts the next one. Both
are linear in the corrected sample before and in the x0 of the last steps, and the predictor and the corrector of one
interval scale that sample by the same sigma'/sigma. With y the corrected sample,

    x  = A*y_before + P*(h0, h1, h2)              how the step before predicted the sample x
    y  = A*y_before + K*(h0, h1, h2) + k*x0       the corrector
       = x + (K - P)*(h0, h1, h2) + k*x0
    x' = A'*y + P'*(x0, h0, h1)                   the predictor

so y_before cancels and one affine row does both, with no state beside the history of x0.
"""

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.errors import InputError
from qdm_deploy.samplers.columns import HISTORY, StepColumns
from qdm_deploy.samplers.multistep import multistep_grid
from qdm_deploy.samplers.run_options import RunOptions
from qdm_deploy.samplers.schedule import NoiseSchedule
from qdm_deploy.samplers.sigmas import SigmaGrid

__all__ = ["unipc_columns"]


def unipc_columns(schedule: NoiseSchedule, run: RunOptions) -> StepColumns:
    """Columns of the UniPC sampler.

    Args:
        schedule: Noise levels, spacing, sigma schedule and solver options.
        run: Number of steps, sigma schedule, first step.

    Returns:
        Columns of [S].

    Raises:
        InputError: The config asks for another solver inside, for predicted noise, for an order above 3, or for a
            high order at a sigma of zero.
    """
    options = schedule.solver
    _refuse_foreign_options(schedule)
    # Under diffusers' rules a schedule of its own sigmas ends at their last one, which is the smallest training sigma
    # unless the config moves it.
    own = options.sigma_schedule if run.sigmas is None else run.sigmas
    smallest: Literal["sigma_min", "last"] = "sigma_min" if own == "spaced" else "last"
    grid = multistep_grid(
        schedule, run, final="zero" if options.final_sigmas_type == "zero" else smallest, bounded=True
    )
    steps = grid.timesteps.size
    rows = np.zeros((steps - run.first_step, 2 + HISTORY))
    predicted, order = np.zeros(HISTORY), 0
    for step in range(run.first_step, steps):
        # y in terms of x, x0, h0, h1, h2.
        y = np.array([1.0, 0.0, 0.0, 0.0, 0.0])
        if step > run.first_step and step - 1 not in options.disable_corrector:
            ours, past = _corrector(grid, step, order, linear_b=options.solver_type == "bh1")
            y += np.array([0.0, ours, *(past - predicted)])
        left = steps - step if options.lower_order_final else options.solver_order
        order = min(options.solver_order, left, step - run.first_step + 1)
        kept, predicted = _predictor(grid, step, order, linear_b=options.solver_type == "bh1")
        rows[step - run.first_step] = kept * y + np.array([0.0, *predicted, 0.0])
    a, b, c0, c1, c2 = rows.T
    here = slice(run.first_step, steps)
    return StepColumns(grid.timesteps[here], grid.signal[here], grid.noise[here], a=a, b=b, c0=c0, c1=c1, c2=c2)


def _refuse_foreign_options(schedule: NoiseSchedule) -> None:
    options = schedule.solver
    if options.solver_p is not None or not options.predict_x0 or options.solver_order > HISTORY:
        key, value = next(
            (key, value)
            for key, value, refused in (
                ("solver_p", options.solver_p, options.solver_p is not None),
                ("predict_x0", options.predict_x0, not options.predict_x0),
                ("solver_order", options.solver_order, options.solver_order > HISTORY),
            )
            if refused
        )
        raise InputError(
            f"the scheduler config has {key}={value!r}, which sampler 'unipc' does not implement (it predicts x0, "
            "alone, at order 1 to 3): change it in scheduler_config.json, or take sampler 'dpmpp-2m'"
        )
    if not options.lower_order_final and options.solver_order > 1 and options.final_sigmas_type == "zero":
        raise InputError(
            "the scheduler config has lower_order_final=False and final_sigmas_type='zero': sampler 'unipc' would end "
            "at an infinite step of high order; set lower_order_final to true"
        )


def _predictor(grid: SigmaGrid, step: int, order: int, *, linear_b: bool) -> tuple[float, NDArray[np.float64]]:
    """The factors of y and of the x0 of this step and the two before."""
    h = grid.half_log_snr[step + 1] - grid.half_log_snr[step]
    factors = np.zeros(HISTORY)
    if h == 0.0:
        return 1.0, factors
    next_signal = grid.signal[step + 1]
    factors[0] = -next_signal * math.expm1(-h)
    if order > 1:
        ratios = _ratios(grid, step, order, h)
        rho = np.array([0.5]) if order == 2 else np.linalg.solve(*_system(ratios, h, order - 1, linear_b=linear_b))
        _add_differences(factors, -next_signal * _b_of(h, linear_b=linear_b) * rho, ratios)
    return float(grid.noise[step + 1] / grid.noise[step]), factors


def _corrector(grid: SigmaGrid, step: int, order: int, *, linear_b: bool) -> tuple[float, NDArray[np.float64]]:
    """The factors of this step's x0 and of the three before, for the interval that ends at this step."""
    h = grid.half_log_snr[step] - grid.half_log_snr[step - 1]
    factors = np.zeros(HISTORY)
    if h == 0.0:
        return 0.0, factors
    signal = grid.signal[step]
    factors[0] = -signal * math.expm1(-h)
    ratios = _ratios(grid, step - 1, order, h)
    rho = (
        np.array([0.5])
        if order == 1
        else np.linalg.solve(*_system(np.append(ratios, 1.0), h, order, linear_b=linear_b))
    )
    weights = -signal * _b_of(h, linear_b=linear_b) * rho
    _add_differences(factors, weights[:-1], ratios)
    factors[0] -= weights[-1]
    return float(weights[-1]), factors


def _ratios(grid: SigmaGrid, step: int, order: int, h: float) -> NDArray[np.float64]:
    """Where the x0 before that of ``step`` lie, in units of h: [order - 1], negative."""
    half_log_snr = grid.half_log_snr
    return np.asarray((half_log_snr[step - np.arange(1, order)] - half_log_snr[step]) / h)


def _system(
    ratios: NDArray[np.float64], h: float, order: int, *, linear_b: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The matrix and the right side that make the update exact for polynomials (eq. 8 and theorem 3.1)."""
    matrix = np.vander(ratios, order, increasing=True).T
    right = np.zeros(order)
    phi, factorial = math.expm1(-h) / -h - 1.0, 1.0
    for row in range(order):
        right[row] = phi * factorial / _b_of(h, linear_b=linear_b)
        factorial *= row + 2
        phi = phi / -h - 1.0 / factorial
    return matrix, right


def _b_of(h: float, *, linear_b: bool) -> float:
    return -h if linear_b else math.expm1(-h)


def _add_differences(factors: NDArray[np.float64], weights: NDArray[np.float64], ratios: NDArray[np.float64]) -> None:
    """Add sum of weight * (m_i - m_0)/ratio_i to the factors of m_0, m_1, ..."""
    share = weights / ratios
    factors[1 : 1 + share.size] += share
    factors[0] -= share.sum()
