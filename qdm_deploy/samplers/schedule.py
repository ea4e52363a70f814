"""What a sampler must know of a model's training: its noise levels, what it predicts, and how its config samples.

A ``NoiseSchedule`` is read once from a diffusers ``scheduler_config.json``; after that no sampler looks at the config.
What the step graph cannot express is refused here when it touches every sampler (dynamic thresholding needs a
quantile of the image, which no affine step has), and by the sampler itself when it touches only that one
(``solver_options``).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qdm_deploy.errors import InputError
from qdm_deploy.samplers.betas import (
    BetaSchedule,
    alphas_cumprod_from_betas,
    checked_trained_betas,
    named_betas,
    zero_terminal_snr,
)

__all__ = ["NoiseSchedule", "PredictionType", "TimestepSpacing", "VarianceType"]

PredictionType = Literal["epsilon", "v_prediction", "sample"]
TimestepSpacing = Literal["leading", "linspace", "trailing"]
VarianceType = Literal["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"]

# Values that a class assumes when its config leaves the key out. Classes without a clip never clip: DDIM's own default
# (clip to [-1, 1]) would destroy the latents of a model that was published with one of them.
_CLASS_DEFAULTS: dict[str, dict[str, object]] = {
    "DDPMScheduler": {"clip_sample": True, "timestep_spacing": "leading"},
    "DDIMScheduler": {"clip_sample": True, "timestep_spacing": "leading"},
    "PNDMScheduler": {"set_alpha_to_one": False, "timestep_spacing": "leading"},
    "DPMSolverMultistepScheduler": {"timestep_spacing": "linspace"},
    "EulerDiscreteScheduler": {"timestep_spacing": "linspace"},
}

# Options of the solvers that walk a grid of sigmas, with the one value that the tables here stand for.
# lower_order_final and euler_at_final are absent on purpose: with a final sigma of zero the last step of the
# second-order solver is first-order whatever they say.
_SOLVER_OPTIONS: dict[str, object] = {
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "solver_type": "midpoint",
    "lambda_min_clipped": float("-inf"),
    "use_lu_lambdas": False,
    "use_flow_sigmas": False,
    "final_sigmas_type": "zero",
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "interpolation_type": "linear",
    "timestep_type": "discrete",
}

_SMALLEST_ALPHA_CUMPROD = 2.0**-24


class _SchedulerConfig(BaseModel):
    """The keys that matter here; a diffusers config carries many more, also those of other classes."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    num_train_timesteps: int = Field(default=1000, ge=1)
    beta_start: float = Field(default=0.0001, gt=0, lt=1)
    beta_end: float = Field(default=0.02, gt=0, lt=1)
    beta_schedule: BetaSchedule = "linear"
    trained_betas: tuple[float, ...] | None = None
    rescale_betas_zero_snr: bool = False
    prediction_type: PredictionType = "epsilon"
    variance_type: VarianceType = "fixed_small"
    thresholding: bool = False
    clip_sample: bool = False
    clip_sample_range: float = Field(default=1.0, gt=0)
    set_alpha_to_one: bool = True
    timestep_spacing: TimestepSpacing
    steps_offset: int = Field(default=0, ge=0)


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """Noise levels of the training process and the sampling habits of the model's own config.

    ``alphas_cumprod`` is [T] float64, read-only, falling, in [0, 1): x_t = sqrt(alphas_cumprod[t]) * x_0 +
    sqrt(1 - alphas_cumprod[t]) * noise. ``solver_options`` holds the options of dpmpp-2m and euler that differ from
    what their tables implement.
    """

    alphas_cumprod: NDArray[np.float64]
    prediction_type: PredictionType = "epsilon"
    clip_sample: bool = False
    clip_sample_range: float = 1.0
    timestep_spacing: TimestepSpacing = "leading"
    steps_offset: int = 0
    variance_type: VarianceType = "fixed_small"
    set_alpha_to_one: bool = True
    solver_options: tuple[tuple[str, object], ...] = ()

    def __post_init__(self) -> None:
        levels = self.alphas_cumprod
        if levels.ndim != 1 or levels.size == 0 or not _falling_in_unit_interval(levels):
            raise InputError(
                f"alphas_cumprod has shape {levels.shape} and values {_range_of(levels)}; "
                "it must be one falling row of values in [0, 1): check the betas of the scheduler config"
            )
        levels.setflags(write=False)

    @property
    def num_train_timesteps(self) -> int:
        """Number of training timesteps T; timesteps are 0 .. T - 1."""
        return int(self.alphas_cumprod.size)

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> Self:
        """Read a diffusers scheduler config.

        Args:
            config: Contents of ``scheduler_config.json`` of a DDPM, DDIM, PNDM, DPMSolverMultistep or EulerDiscrete
                scheduler. Missing keys take the defaults of that class; keys of other classes are ignored, as
                diffusers does.

        Returns:
            The schedule; its ``alphas_cumprod`` are the float32 values of diffusers.

        Raises:
            InputError: The class is another one, a value is of the wrong type or unknown, or the config asks for
                dynamic thresholding.
        """
        name = config.get("_class_name")
        if not isinstance(name, str) or name not in _CLASS_DEFAULTS:
            raise InputError(
                f"the scheduler config is of class {name!r}; known are {', '.join(_CLASS_DEFAULTS)}: "
                "save the model with one of these schedulers (from_config of its own scheduler)"
            )
        given = {key: value for key, value in config.items() if value is not None}
        try:
            known = _SchedulerConfig.model_validate({**_CLASS_DEFAULTS[name], **given})
        except ValidationError as err:
            first = err.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            raise InputError(
                f"the scheduler config has {key}={first['input']!r}: {first['msg']}; correct scheduler_config.json"
            ) from err
        if known.thresholding:
            raise InputError(
                "the scheduler config has thresholding=True; a step must be affine in the image, and dynamic "
                "thresholding is not: set thresholding to false (clip_sample may stay)"
            )
        return cls(
            alphas_cumprod=_alphas_cumprod_of(known),
            prediction_type=known.prediction_type,
            clip_sample=known.clip_sample,
            clip_sample_range=known.clip_sample_range,
            timestep_spacing=known.timestep_spacing,
            steps_offset=known.steps_offset,
            variance_type=known.variance_type,
            set_alpha_to_one=known.set_alpha_to_one,
            solver_options=tuple(
                (key, given[key]) for key, value in _SOLVER_OPTIONS.items() if given.get(key, value) != value
            ),
        )

    def refuse_solver_options(self, sampler: str, honoured: tuple[str, ...]) -> None:
        """Refuse the options of the config that would change ``sampler`` and that its table does not implement.

        Args:
            sampler: Name for the message.
            honoured: Names of the options that mean something to this sampler.

        Raises:
            InputError: One of them has another value than the table stands for.
        """
        for key, value in self.solver_options:
            if key in honoured:
                raise InputError(
                    f"the scheduler config has {key}={value!r}, which sampler {sampler!r} does not implement (only "
                    f"{_SOLVER_OPTIONS[key]!r}): change it in scheduler_config.json, or take sampler 'ddim' or 'ddpm'"
                )

    def positive_alphas_cumprod(self) -> NDArray[np.float64]:
        """``alphas_cumprod`` for solvers that divide by it: an exact zero becomes 2**-24, as diffusers sets it."""
        return np.where(self.alphas_cumprod == 0.0, _SMALLEST_ALPHA_CUMPROD, self.alphas_cumprod)


def _alphas_cumprod_of(config: _SchedulerConfig) -> NDArray[np.float64]:
    if config.trained_betas is not None:
        betas = checked_trained_betas(config.trained_betas, config.num_train_timesteps)
    else:
        betas = named_betas(config.beta_schedule, config.beta_start, config.beta_end, config.num_train_timesteps)
    return alphas_cumprod_from_betas(zero_terminal_snr(betas) if config.rescale_betas_zero_snr else betas)


def _falling_in_unit_interval(levels: NDArray[np.float64]) -> bool:
    return bool(levels[0] < 1.0 and levels[-1] >= 0.0 and np.all(np.diff(levels) < 0.0))


def _range_of(levels: NDArray[np.float64]) -> str:
    return f"{levels.min():g} .. {levels.max():g}" if levels.size else "none"
