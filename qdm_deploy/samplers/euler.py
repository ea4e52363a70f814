"""The Euler sampler (arXiv 2206.00364, algorithm 1 without churn) and its ancestral form (k-diffusion).

diffusers keeps y = x/signal, whose noise has the deviation sigma, and hands the network x. Here the sample is x itself
at all times, so a step of y, y' = (s/sigma) y + (1 - s/sigma) x0 + up*noise, is multiplied by the signal it arrives at.
For the same reason a run starts at sigma/sqrt(sigma**2 + 1) of unit noise where diffusers starts at sigma, and at unit
noise where diffusers starts at sqrt(sigma**2 + 1) (leading spacing). There is no clipping.
"""

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.errors import InputError
from qdm_deploy.samplers.columns import StepColumns
from qdm_deploy.samplers.run_options import RunOptions
from qdm_deploy.samplers.schedule import NoiseSchedule
from qdm_deploy.samplers.scheduler_config import SigmaSchedule
from qdm_deploy.samplers.sigmas import SigmaGrid, chosen_schedule, euler_grid, final_sigma

__all__ = ["euler_ancestral_columns", "euler_columns", "sigma_start"]


def euler_columns(schedule: NoiseSchedule, run: RunOptions) -> StepColumns:
    """Columns of the Euler sampler.

    Args:
        schedule: Noise levels, spacing and sigma schedule.
        run: Number of steps, listed timesteps or sigmas.

    Returns:
        Columns of [S].

    Raises:
        InputError: The config asks for continuous timesteps, or what was listed cannot be used.
    """
    options = schedule.solver
    if options.timestep_type == "continuous" and schedule.prediction_type == "v_prediction":
        raise InputError(
            "the scheduler config has timestep_type='continuous' for a v_prediction model, whose timesteps are "
            "logarithms of sigma, which sampler 'euler' does not implement: take a model with discrete timesteps"
        )
    grid = euler_grid(
        schedule,
        run,
        kind=_kind(schedule, run),
        final=final_sigma(options.final_sigmas_type, schedule),
        bounded=True,
        log_linear=options.interpolation_type == "log_linear",
    )
    return _columns(schedule, grid, down=grid.sigmas[1:], up=np.zeros_like(grid.timesteps))


def euler_ancestral_columns(schedule: NoiseSchedule, run: RunOptions) -> StepColumns:
    """Columns of the ancestral Euler sampler: each step falls below its target and is lifted to it by fresh noise.

    Args:
        schedule: Noise levels and spacing; sigma schedules of the config do not count, as in diffusers.
        run: Number of steps, or another sigma schedule.

    Returns:
        Columns of [S].

    Raises:
        InputError: The sigmas that were listed cannot be used.
    """
    kind = run.sigmas if isinstance(run.sigmas, str) else "spaced"
    grid = euler_grid(schedule, run, kind=kind, final=0.0, bounded=False, log_linear=False)
    here, there = grid.sigmas[:-1], grid.sigmas[1:]
    up = there * np.sqrt(1.0 - (there / here) ** 2)
    return _columns(schedule, grid, down=there**2 / here, up=up)


def sigma_start(schedule: NoiseSchedule, grid: SigmaGrid) -> float:
    """The scale of the unit noise that a run of sigmas starts from."""
    return 1.0 if schedule.timestep_spacing == "leading" else float(grid.noise[0])


def _kind(schedule: NoiseSchedule, run: RunOptions) -> SigmaSchedule:
    return "spaced" if run.sigmas is not None and not isinstance(run.sigmas, str) else chosen_schedule(schedule, run)


def _columns(
    schedule: NoiseSchedule, grid: SigmaGrid, down: NDArray[np.float64], up: NDArray[np.float64]
) -> StepColumns:
    signal, next_signal = grid.signal[:-1], grid.signal[1:]
    kept = down / grid.sigmas[:-1]
    return StepColumns(
        grid.timesteps,
        signal,
        grid.noise[:-1],
        initial_scale=sigma_start(schedule, grid),
        a=next_signal * kept / signal,
        b=next_signal * (1.0 - kept),
        d=next_signal * up,
    )
