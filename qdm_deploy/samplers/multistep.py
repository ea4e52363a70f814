"""What the multistep solvers (DPM-Solver++, UniPC, DEIS) share: their grid and the order of each of their steps."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.samplers.run_options import RunOptions
from qdm_deploy.samplers.schedule import NoiseSchedule
from qdm_deploy.samplers.scheduler_config import SigmaSchedule
from qdm_deploy.samplers.sigmas import SigmaGrid, chosen_schedule, laid_sigmas, timestep_of, training_sigmas
from qdm_deploy.samplers.spacing import given_timesteps, multistep_timesteps

__all__ = ["SHORT_RUN", "multistep_grid"]

# ``lower_order_final`` only matters to runs of fewer steps.
SHORT_RUN = 15


def multistep_grid(
    schedule: NoiseSchedule,
    run: RunOptions,
    *,
    final: Literal["zero", "sigma_min", "last"],
    reachable: int | None = None,
    bounded: bool = False,
    rounded: tuple[SigmaSchedule | Literal["lu"], ...] = ("karras",),
    lu_lambdas: bool = False,
) -> SigmaGrid:
    """The grid of a multistep solver: whole timesteps, which may repeat where the sigmas have their own schedule.

    Args:
        schedule: Noise levels and spacing.
        run: Number of steps or listed timesteps, and the sigma schedule.
        final: Where the run ends: at 0, at the smallest training sigma, or at the last sigma of the grid again.
        reachable: Number of training timesteps in reach, None for all.
        bounded: The config's ``sigma_min`` and ``sigma_max`` count.
        rounded: Sigma schedules whose timesteps are rounded; those of the others are cut to whole ones.
        lu_lambdas: Sigmas fall in equal steps of their logarithm (DPM-Solver, arXiv 2206.00927, section 3.3).

    Returns:
        The grid.

    Raises:
        InputError: The spacing or what was listed cannot be used.
    """
    trained = training_sigmas(schedule)
    log_sigmas = np.log(trained)
    kind: SigmaSchedule | Literal["lu"] = chosen_schedule(schedule, run)
    if lu_lambdas and kind != "karras":
        kind = "lu"
    if kind == "spaced":
        timesteps = (
            multistep_timesteps(schedule, run.steps, reachable).astype(np.float64)
            if run.timesteps is None
            else given_timesteps(schedule, run.timesteps, whole=True)
        )
        sigmas = trained[timesteps.astype(np.int64)].astype(np.float64)
        end = 0.0 if final == "zero" else float(trained[0])
        return SigmaGrid(timesteps, np.append(sigmas, end))
    smallest, largest = schedule.solver.sigma_min, schedule.solver.sigma_max
    smallest = smallest if bounded and smallest is not None else float(trained[0])
    largest = largest if bounded and largest is not None else float(trained[-1])
    if kind == "lu":
        sigmas = np.exp(np.linspace(float(log_sigmas[-1]), float(log_sigmas[0]), run.steps))
    else:
        sigmas = laid_sigmas(kind, largest, smallest, run.steps)
    timesteps = timestep_of(sigmas, log_sigmas)
    whole = timesteps.round() if kind in rounded else np.trunc(timesteps)
    end = {"zero": 0.0, "sigma_min": float(trained[0]), "last": float(sigmas[-1])}[final]
    return SigmaGrid(whole, _float32(np.append(sigmas, end)))


def _float32(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return values.astype(np.float32).astype(np.float64)
