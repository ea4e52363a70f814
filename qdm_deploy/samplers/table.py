"""A sampler as data: one row of float32 coefficients per call of the network, the same numbers for every backend."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.errors import InputError
from qdm_deploy.samplers.columns import StepColumns, stack_columns
from qdm_deploy.samplers.ddim import ddim_columns
from qdm_deploy.samplers.ddpm import ddpm_columns
from qdm_deploy.samplers.deis import deis_columns
from qdm_deploy.samplers.dpmpp import dpmpp_columns
from qdm_deploy.samplers.euler import euler_ancestral_columns, euler_columns
from qdm_deploy.samplers.lcm import lcm_columns
from qdm_deploy.samplers.lms import lms_columns
from qdm_deploy.samplers.pndm import pndm_columns
from qdm_deploy.samplers.run_options import RunOptions
from qdm_deploy.samplers.schedule import NoiseSchedule
from qdm_deploy.samplers.scheduler_config import SigmaSchedule, TimestepSpacing
from qdm_deploy.samplers.tcd import tcd_columns
from qdm_deploy.samplers.unipc import unipc_columns

__all__ = ["SAMPLERS", "StepTable", "first_step_of_strength", "step_table"]


@dataclass(frozen=True)
class _Sampler:
    """How a sampler's columns are made, its spacing where the config names none, and the options it takes."""

    columns: Callable[[NoiseSchedule, RunOptions], StepColumns]
    spacing: TimestepSpacing
    options: frozenset[str] = frozenset()
    # Its columns begin at ``first_step`` already, because it looks back.
    looks_back: bool = False
    eta: float = 0.0


def _dpmpp(order: int, *, stochastic: bool) -> _Sampler:
    columns = partial(dpmpp_columns, order=order, stochastic=stochastic)
    return _Sampler(columns, "linspace", frozenset({"sigmas", "timesteps"}), looks_back=True)


_SIGMAS = frozenset({"sigmas"})
_DISTILLED = frozenset({"timesteps", "original_inference_steps"})
_SAMPLERS = {
    "ddpm": _Sampler(ddpm_columns, "leading", frozenset({"timesteps"})),
    "ddim": _Sampler(ddim_columns, "leading", frozenset({"eta", "use_clipped_model_output"})),
    "pndm": _Sampler(pndm_columns, "leading", looks_back=True),
    "lms": _Sampler(lms_columns, "linspace", _SIGMAS, looks_back=True),
    "euler": _Sampler(euler_columns, "linspace", frozenset({"sigmas", "timesteps"})),
    "euler-a": _Sampler(euler_ancestral_columns, "linspace", _SIGMAS),
    "dpmpp-2m": _dpmpp(2, stochastic=False),
    "dpmpp-2m-sde": _dpmpp(2, stochastic=True),
    "dpmpp-3m": _dpmpp(3, stochastic=False),
    "dpmpp-3m-sde": _dpmpp(3, stochastic=True),
    "unipc": _Sampler(unipc_columns, "linspace", _SIGMAS, looks_back=True),
    "deis": _Sampler(deis_columns, "linspace", _SIGMAS, looks_back=True),
    "lcm": _Sampler(lcm_columns, "leading", _DISTILLED),
    "tcd": _Sampler(tcd_columns, "leading", _DISTILLED | {"eta"}, eta=0.3),
}

SAMPLERS: tuple[str, ...] = tuple(_SAMPLERS)

# Samplers that others offer and that call the network twice a step, or other names, with the nearest one here.
_NEAREST = {
    "heun": "euler or dpmpp-2m",
    "dpm2": "dpmpp-2m",
    "dpm2-a": "euler-a",
    "dpmpp-sde": "dpmpp-2m-sde",
    "dpmpp-2s-a": "euler-a",
    "dpmpp-2s": "dpmpp-2m",
    "plms": "pndm",
}


@dataclass(frozen=True, eq=False)
class StepTable:
    """The calls of the network in one run, from noise to image; all arrays are read-only.

    ``timesteps`` is [S]: whole or not, and not always strictly falling (PLMS repeats one). ``coefficients`` is [S, 13]
    float32 with the columns ``COEFFICIENTS``, or [S, 15] for a model that learned its variance. A run starts from unit
    Gaussian noise times ``initial_scale`` and from a history of zeros. ``signal`` and ``noise``, [S] float64, say what
    the state before each row holds, for runs that start from an image or keep part of one: signal*image +
    noise*unit noise; both are empty in a table that was made by hand without them.
    """

    sampler: str
    timesteps: NDArray[np.float64] | NDArray[np.int64]
    coefficients: NDArray[np.float32]
    initial_scale: float = 1.0
    signal: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    noise: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))

    def __post_init__(self) -> None:
        for array in (self.timesteps, self.coefficients, self.signal, self.noise):
            array.setflags(write=False)

    @property
    def steps(self) -> int:
        """Number of calls of the network S; PLMS makes one more than the steps that were asked for."""
        return int(self.timesteps.size)

    @property
    def has_whole_timesteps(self) -> bool:
        """Every timestep is a whole number."""
        return bool(np.all(self.timesteps == np.round(self.timesteps)))

    def head(self, rows: int) -> "StepTable":
        """The first ``rows`` rows: a run that stops early and hands on its noisy samples."""
        arrays = {name: getattr(self, name)[:rows] for name in ("timesteps", "coefficients", "signal", "noise")}
        return replace(self, **arrays)

    def rows_before(self, fraction: float, num_train_timesteps: int) -> int:
        """How many rows a run makes until the given fraction of the denoising is done.

        Args:
            fraction: 0 .. 1, as ``denoising_end`` of the base and ``denoising_start`` of the refiner in diffusers.
            num_train_timesteps: T of the model.

        Returns:
            The length of the first model's ``head``, and the second model's ``first_step``.
        """
        cut = round(num_train_timesteps - fraction * num_train_timesteps)
        return int(np.count_nonzero(self.timesteps >= cut))


def first_step_of_strength(steps: int, strength: float) -> int:
    """Where a run that starts from an image begins, as the image-to-image pipelines of diffusers count.

    Args:
        steps: Number of steps of the whole run.
        strength: 0 .. 1, how much of the run is made.

    Returns:
        ``first_step`` for ``step_table``.

    Raises:
        InputError: The strength is out of range, or leaves no step.
    """
    if not 0.0 <= strength <= 1.0:
        raise InputError(f"strength={strength} is out of range; choose 0 .. 1")
    made = min(int(steps * strength), steps)
    if made < 1:
        raise InputError(f"strength={strength} of {steps} steps leaves no step; give a greater strength or more steps")
    return steps - made


def step_table(
    schedule: NoiseSchedule,
    sampler: str,
    steps: int | None = None,
    *,
    eta: float | None = None,
    use_clipped_model_output: bool = False,
    sigmas: SigmaSchedule | Sequence[float] | None = None,
    timesteps: Sequence[float] | None = None,
    timestep_spacing: TimestepSpacing | None = None,
    original_inference_steps: int | None = None,
    first_step: int = 0,
    learned_variance: bool = False,
    whole_timesteps: bool = False,
) -> StepTable:
    """The coefficient table of a sampler.

    Args:
        schedule: The model's noise schedule.
        sampler: One of ``SAMPLERS``.
        steps: Number of steps, 1 .. T; may be left out where ``timesteps`` or a list of ``sigmas`` says it.
        eta: Share of fresh noise, 0 .. 1: of 'ddim' (default 0), and the gamma of 'tcd' (default 0.3).
        use_clipped_model_output: 'ddim' derives the noise anew from the clipped x0.
        sigmas: 'spaced' (those of the spaced timesteps), 'karras', 'exponential' or 'beta'; for 'euler' and 'euler-a'
            also a list that falls, whose last one is where the run ends. None leaves it to the config.
        timesteps: A list that falls, instead of a spacing: 'ddpm', 'euler', the 'dpmpp' samplers, 'lcm' and 'tcd'.
        timestep_spacing: Instead of the config's.
        original_inference_steps: Number of timesteps that a model for 'lcm' or 'tcd' was distilled on; None leaves it
            to the config.
        first_step: Rows of the whole run that are left out at its start, for a run from an image.
        learned_variance: The model has 2C output channels, so the graph takes fifteen coefficients.
        whole_timesteps: The graph takes whole timesteps only: where neither the config nor ``timestep_spacing`` says a
            spacing and the sampler's own lies between them, 'leading' is taken.

    Returns:
        The table; all arithmetic is float64, cast to float32 at the end.

    Raises:
        InputError: Unknown sampler, a value out of range, an option that the sampler does not have, or a schedule that
            it cannot follow.
    """
    if sampler not in _SAMPLERS:
        raise InputError(_unknown(sampler))
    kind = _SAMPLERS[sampler]
    _refuse_foreign(
        sampler,
        kind,
        {
            "eta": eta or None,
            "use_clipped_model_output": use_clipped_model_output or None,
            "sigmas": sigmas,
            "timesteps": timesteps,
            "original_inference_steps": original_inference_steps,
        },
    )
    run = RunOptions(
        steps=_number_of_steps(schedule, steps, sigmas, timesteps),
        eta=_checked_eta(kind.eta if eta is None else eta),
        use_clipped_model_output=use_clipped_model_output,
        sigmas=sigmas,
        timesteps=timesteps,
        original_inference_steps=original_inference_steps,
        first_step=first_step,
        learned_variance=learned_variance,
    )
    spacing = timestep_spacing or schedule.timestep_spacing
    table = _table(sampler, kind, replace(schedule, timestep_spacing=spacing or kind.spacing), run)
    if whole_timesteps and spacing is None and not table.has_whole_timesteps:
        return _table(sampler, kind, replace(schedule, timestep_spacing="leading"), run)
    return table


def _table(sampler: str, kind: _Sampler, schedule: NoiseSchedule, run: RunOptions) -> StepTable:
    # PLMS alone has a row more than steps.
    rows = run.steps + (sampler == "pndm" and run.steps > 1)
    if not 0 <= run.first_step < rows:
        raise InputError(f"first_step={run.first_step} is out of range; this run has steps 0 .. {rows - 1}")
    columns = kind.columns(schedule, run)
    skipped = 0 if kind.looks_back else run.first_step
    coefficients = stack_columns(columns, schedule.prediction_type, run.learned_variance)
    return StepTable(
        sampler,
        columns.timesteps[skipped:],
        coefficients[skipped:],
        initial_scale=columns.initial_scale,
        signal=columns.signal[skipped:],
        noise=columns.noise[skipped:],
    )


def _unknown(sampler: str) -> str:
    nearest = _NEAREST.get(sampler)
    advice = f"the nearest is {nearest}; all are" if nearest else "choose one of"
    return f"sampler {sampler!r} is unknown; {advice} {', '.join(SAMPLERS)}"


def _refuse_foreign(sampler: str, kind: _Sampler, given: dict[str, object]) -> None:
    for name, value in given.items():
        if value is not None and name not in kind.options:
            takers = ", ".join(known for known, other in _SAMPLERS.items() if name in other.options)
            raise InputError(
                f"{name}={value} was given for sampler {sampler!r}, but only {takers} know it; leave it out"
            )


def _number_of_steps(
    schedule: NoiseSchedule,
    steps: int | None,
    sigmas: SigmaSchedule | Sequence[float] | None,
    timesteps: Sequence[float] | None,
) -> int:
    listed_sigmas = sigmas if sigmas is not None and not isinstance(sigmas, str) else None
    if listed_sigmas is not None and timesteps is not None:
        raise InputError("both timesteps and sigmas were listed; give one of them")
    listed = None if listed_sigmas is None else max(len(listed_sigmas) - 1, 1)
    if timesteps is not None:
        listed = len(timesteps)
    if listed is not None and steps not in (None, listed):
        raise InputError(f"steps={steps}, but {listed} steps were listed; leave steps out")
    steps = listed if listed is not None else steps
    total = schedule.num_train_timesteps
    if steps is None:
        raise InputError("no number of steps was given; give steps, or list timesteps or sigmas")
    if not 1 <= steps <= total:
        raise InputError(f"steps={steps} is out of range; the model has {total} timesteps, so choose 1 .. {total}")
    return steps


def _checked_eta(eta: float) -> float:
    if not 0.0 <= eta <= 1.0:
        raise InputError(f"eta={eta} is out of range; choose 0 (deterministic) .. 1 (ancestral)")
    return eta
