"""The noise levels that a solver walks, as sigma = sqrt((1 - alphas_cumprod)/alphas_cumprod).

A grid is laid in sigma and each of its points then gets a timestep for the network, which may fall between two
training timesteps (Euler), or is made whole and may then repeat (the multistep solvers). The values are rounded to
float32 where diffusers rounds them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.errors import InputError
from qdm_deploy.samplers.beta_quantile import symmetric_beta_quantile
from qdm_deploy.samplers.run_options import RunOptions
from qdm_deploy.samplers.schedule import NoiseSchedule
from qdm_deploy.samplers.scheduler_config import SigmaSchedule
from qdm_deploy.samplers.spacing import fractional_timesteps, given_timesteps

__all__ = ["SigmaGrid", "chosen_schedule", "euler_grid", "final_sigma", "laid_sigmas", "timestep_of", "training_sigmas"]

# "Elucidating the Design Space of Diffusion-Based Generative Models" (arXiv 2206.00364), eq. 5.
_KARRAS_RHO = 7.0
# "Beta Sampling is All You Need" (arXiv 2407.12173).
_BETA_SHAPE = 0.6


@dataclass(frozen=True, eq=False)
class SigmaGrid:
    """The points of a run of S steps: ``timesteps`` [S] float64 and ``sigmas`` [S + 1] float64, where steps end too.

    The values of ``sigmas`` are exact in float32; the last may be 0.
    """

    timesteps: NDArray[np.float64]
    sigmas: NDArray[np.float64]

    @cached_property
    def signal(self) -> NDArray[np.float64]:
        """[S + 1] float64, alpha: the share of the image in x."""
        return np.asarray(1.0 / np.sqrt(self.sigmas**2 + 1.0))

    @cached_property
    def noise(self) -> NDArray[np.float64]:
        """[S + 1] float64: the share of the unit noise in x."""
        return self.sigmas * self.signal

    @cached_property
    def half_log_snr(self) -> NDArray[np.float64]:
        """[S + 1] float64, lambda = ln(signal/noise); infinite where sigma is 0."""
        with np.errstate(divide="ignore"):
            return -np.log(self.sigmas)


def training_sigmas(schedule: NoiseSchedule) -> NDArray[np.float32]:
    """Sigma of each training timestep, [T] float32, rising; finite also for a schedule of zero terminal SNR."""
    levels = schedule.positive_alphas_cumprod().astype(np.float32)
    return np.asarray(np.sqrt((np.float32(1.0) - levels) / levels))


def chosen_schedule(schedule: NoiseSchedule, run: RunOptions) -> SigmaSchedule:
    """The sigma schedule of a run: the caller's, else the config's.

    Raises:
        InputError: Timesteps were listed too, or sigmas were listed for a sampler that takes none.
    """
    if not (run.sigmas is None or isinstance(run.sigmas, str)):
        raise InputError(
            "this sampler takes no list of sigmas, as in diffusers; list timesteps instead, or take sampler 'euler'"
        )
    chosen = schedule.solver.sigma_schedule if run.sigmas is None else run.sigmas
    if run.timesteps is not None and chosen != "spaced":
        raise InputError(f"timesteps were listed together with {chosen!r} sigmas; give sigmas='spaced' with them")
    return chosen


def laid_sigmas(kind: SigmaSchedule, largest: float, smallest: float, steps: int) -> NDArray[np.float64]:
    """Sigmas of a named schedule.

    Args:
        kind: 'karras', 'exponential' or 'beta'.
        largest: First sigma.
        smallest: Last sigma, above 0.
        steps: Number of sigmas S; one alone is the largest.

    Returns:
        [S] float64, falling.

    Source: k-diffusion ``get_sigmas_karras`` and ``get_sigmas_exponential``; "Beta Sampling is All You Need".
    """
    ramp = np.linspace(0.0, 1.0, steps)
    if kind == "karras":
        first, last = largest ** (1 / _KARRAS_RHO), smallest ** (1 / _KARRAS_RHO)
        return np.asarray((first + ramp * (last - first)) ** _KARRAS_RHO)
    if kind == "exponential":
        return np.exp(np.linspace(math.log(largest), math.log(smallest), steps))
    return smallest + symmetric_beta_quantile(1.0 - ramp, _BETA_SHAPE) * (largest - smallest)


def timestep_of(sigmas: NDArray[np.floating], log_sigmas: NDArray[np.float32]) -> NDArray[np.float64]:
    """Timesteps whose sigmas are given, interpolated in log sigma; precision as in diffusers.

    Args:
        sigmas: [S] float32 or float64.
        log_sigmas: [T] float32, rising, of the training timesteps.

    Returns:
        [S] float64 in 0 .. T - 1.
    """
    log_sigma = np.log(np.maximum(sigmas, sigmas.dtype.type(1e-10)))
    low = np.clip(np.searchsorted(log_sigmas, log_sigma, side="right") - 1, 0, max(log_sigmas.size - 2, 0))
    high = np.minimum(low + 1, log_sigmas.size - 1)
    with np.errstate(invalid="ignore"):
        weight = (log_sigmas[low] - log_sigma) / (log_sigmas[low] - log_sigmas[high])
    weight = np.clip(np.where(low == high, 0.0, weight).astype(log_sigma.dtype), 0, 1)
    return np.asarray((1 - weight) * low + weight * high, dtype=np.float64)


def final_sigma(kind: Literal["zero", "sigma_min"], schedule: NoiseSchedule) -> float:
    """Where the last step ends."""
    return 0.0 if kind == "zero" else float(training_sigmas(schedule)[0])


def euler_grid(
    schedule: NoiseSchedule, run: RunOptions, *, kind: SigmaSchedule, final: float, bounded: bool, log_linear: bool
) -> SigmaGrid:
    """The grid of the Euler and LMS samplers, where a timestep may be a fraction.

    Args:
        schedule: Noise levels and spacing.
        run: Number of steps, listed timesteps or listed sigmas.
        kind: How the sigmas are laid, unless they are listed.
        final: Sigma at the end, unless they are listed.
        bounded: The config's ``sigma_min`` and ``sigma_max`` count.
        log_linear: Sigmas fall in equal steps of their logarithm, whatever the timesteps.

    Returns:
        The grid; its timesteps are exact in float32.

    Raises:
        InputError: What was listed does not fall or leaves the model's range.
    """
    trained = training_sigmas(schedule)
    log_sigmas = np.log(trained)
    if run.sigmas is not None and not isinstance(run.sigmas, str):
        listed = _listed_sigmas(run.sigmas)
        return _float32_grid(timestep_of(listed[:-1], log_sigmas), listed.astype(np.float64))
    timesteps = (
        fractional_timesteps(schedule, run.steps)
        if run.timesteps is None
        else given_timesteps(schedule, run.timesteps, whole=False).astype(np.float32).astype(np.float64)
    )
    sigmas = np.interp(timesteps, np.arange(trained.size), trained)
    if log_linear:
        sigmas = np.exp(np.linspace(log_sigmas[-1], log_sigmas[0], timesteps.size + 1))
    if kind != "spaced":
        smallest = schedule.solver.sigma_min if bounded else None
        largest = schedule.solver.sigma_max if bounded else None
        sigmas = laid_sigmas(kind, largest or float(sigmas[0]), smallest or float(sigmas[-1]), timesteps.size)
        timesteps = timestep_of(sigmas, log_sigmas)
    return _float32_grid(timesteps, np.append(sigmas, final)[: timesteps.size + 1])


def _float32_grid(timesteps: NDArray[np.float64], sigmas: NDArray[np.float64]) -> SigmaGrid:
    return SigmaGrid(*(values.astype(np.float32).astype(np.float64) for values in (timesteps, sigmas)))


def _listed_sigmas(sigmas: Sequence[float]) -> NDArray[np.float32]:
    listed = np.asarray(sigmas, dtype=np.float32)
    if listed.size < 2 or not np.all(np.isfinite(listed)) or np.any(np.diff(listed) >= 0) or listed[-1] < 0:
        raise InputError(
            f"sigmas={list(sigmas)} must be two or more finite values that fall strictly; the last, where the run "
            "ends, may be 0"
        )
    return listed
