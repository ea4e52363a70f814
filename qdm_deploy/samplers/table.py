"""A sampler as data: one row of float32 coefficients per step, the same numbers for every backend."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.errors import InputError
from qdm_deploy.samplers.columns import StepColumns, prediction_columns
from qdm_deploy.samplers.ddim import ddim_columns
from qdm_deploy.samplers.ddpm import ddpm_columns
from qdm_deploy.samplers.dpmpp_2m import dpmpp_2m_columns
from qdm_deploy.samplers.euler import euler_columns
from qdm_deploy.samplers.schedule import NoiseSchedule

__all__ = ["SAMPLERS", "StepTable", "step_table"]

SAMPLERS: tuple[str, ...] = ("ddpm", "ddim", "dpmpp-2m", "euler")


@dataclass(frozen=True, eq=False)
class StepTable:
    """The steps of one run, from noise to image; both arrays are read-only.

    ``timesteps`` is [S] int64, strictly falling. ``coefficients`` is [S, 7] float32 with the columns p, q, clip, a, b,
    c, d, or [S, 9] with log_var_min and log_var_max for a model that learned its variance. ``c`` of the first row is
    zero, so that any finite ``previous_x0`` may be given there. A run starts from unit Gaussian noise.
    """

    sampler: str
    timesteps: NDArray[np.int64]
    coefficients: NDArray[np.float32]

    def __post_init__(self) -> None:
        self.timesteps.setflags(write=False)
        self.coefficients.setflags(write=False)

    @property
    def steps(self) -> int:
        """Number of steps S."""
        return int(self.timesteps.size)


def step_table(
    schedule: NoiseSchedule, sampler: str, steps: int, *, eta: float = 0.0, learned_variance: bool = False
) -> StepTable:
    """The coefficient table of a sampler.

    Args:
        schedule: The model's noise schedule.
        sampler: One of ``SAMPLERS``.
        steps: Number of steps S, 1 .. T.
        eta: Share of the ancestral noise of 'ddim', 0 .. 1.
        learned_variance: The model has 2C output channels, so the graph takes nine coefficients.

    Returns:
        The table; all arithmetic is float64, cast to float32 at the end.

    Raises:
        InputError: Unknown sampler, steps or eta out of range, eta for another sampler than 'ddim', or a schedule that
            the sampler cannot follow.
    """
    if sampler not in SAMPLERS:
        raise InputError(f"sampler {sampler!r} is unknown; choose one of {', '.join(SAMPLERS)}")
    if not 1 <= steps <= schedule.num_train_timesteps:
        raise InputError(
            f"steps={steps} is out of range; the model has {schedule.num_train_timesteps} timesteps, so choose "
            f"1 .. {schedule.num_train_timesteps}"
        )
    if not 0.0 <= eta <= 1.0:
        raise InputError(f"eta={eta} is out of range; choose 0 (deterministic) .. 1 (ancestral)")
    if eta != 0.0 and sampler != "ddim":
        raise InputError(f"eta={eta} was given for sampler {sampler!r}, but only 'ddim' has an eta; leave it at 0")
    columns = _columns_of(schedule, sampler, steps, eta, learned_variance)
    p, q = prediction_columns(schedule.prediction_type, columns.alphas_cumprod)
    stacked = [p, q, np.full(steps, columns.clip), columns.a, columns.b, columns.c, columns.d]
    if learned_variance:
        stacked += [columns.log_var_min, columns.log_var_max]
    return StepTable(sampler, columns.timesteps, np.stack(stacked, axis=1).astype(np.float32))


def _columns_of(schedule: NoiseSchedule, sampler: str, steps: int, eta: float, learned_variance: bool) -> StepColumns:
    if sampler == "ddpm":
        return ddpm_columns(schedule, steps, learned_variance=learned_variance)
    if sampler == "ddim":
        return ddim_columns(schedule, steps, eta=eta)
    return dpmpp_2m_columns(schedule, steps) if sampler == "dpmpp-2m" else euler_columns(schedule, steps)
