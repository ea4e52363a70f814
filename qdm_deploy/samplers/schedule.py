"""What a sampler must know of a model's training: its noise levels, what it predicts, and how its config samples.

A ``NoiseSchedule`` is read once from a diffusers ``scheduler_config.json``; after that no sampler looks at the config.
What no step can express is refused when the config is read, and what one sampler cannot express by that sampler.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.errors import InputError
from qdm_deploy.samplers.betas import (
    alphas_cumprod_from_betas,
    checked_trained_betas,
    named_betas,
    zero_terminal_snr,
)
from qdm_deploy.samplers.scheduler_config import (
    PredictionType,
    SchedulerConfig,
    SolverOptions,
    TimestepSpacing,
    VarianceType,
    read_scheduler_config,
)

__all__ = ["NoiseSchedule", "PredictionType", "SolverOptions", "TimestepSpacing", "VarianceType"]

_SMALLEST_ALPHA_CUMPROD = 2.0**-24


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """Noise levels of the training process and the sampling habits of the model's own config.

    ``alphas_cumprod`` is [T] float64, read-only, falling, in [0, 1): x_t = sqrt(alphas_cumprod[t]) * x_0 +
    sqrt(1 - alphas_cumprod[t]) * noise. ``timestep_spacing`` and ``set_alpha_to_one`` are None where the config does
    not say; each sampler then takes its own default.
    """

    alphas_cumprod: NDArray[np.float64]
    prediction_type: PredictionType = "epsilon"
    clip_sample: bool = False
    clip_sample_range: float = 1.0
    timestep_spacing: TimestepSpacing | None = None
    steps_offset: int = 0
    variance_type: VarianceType = "fixed_small"
    set_alpha_to_one: bool | None = None
    solver: SolverOptions = field(default_factory=SolverOptions)

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

    @property
    def has_zero_terminal_snr(self) -> bool:
        """The last training timestep holds no signal at all."""
        return bool(self.alphas_cumprod[-1] == 0.0)

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> Self:
        """Read a diffusers scheduler config.

        Args:
            config: Contents of ``scheduler_config.json`` of a scheduler class that a sampler here stands for. Missing
                keys take the defaults of that class; keys that only other classes have are read as those would.

        Returns:
            The schedule; its ``alphas_cumprod`` are the float32 values of diffusers.

        Raises:
            InputError: The class is another one, a value is of the wrong type or unknown, or the config asks for
                what no affine step can do.
        """
        known = read_scheduler_config(config)
        return cls(
            alphas_cumprod=_alphas_cumprod_of(known),
            prediction_type=known.prediction_type,
            clip_sample=known.clip_sample,
            clip_sample_range=known.clip_sample_range,
            timestep_spacing=known.timestep_spacing,
            steps_offset=known.steps_offset,
            variance_type=known.variance_type,
            set_alpha_to_one=known.set_alpha_to_one,
            solver=known,
        )

    def positive_alphas_cumprod(self) -> NDArray[np.float64]:
        """``alphas_cumprod`` for solvers that divide by it: an exact zero becomes 2**-24, as diffusers sets it."""
        return np.where(self.alphas_cumprod == 0.0, _SMALLEST_ALPHA_CUMPROD, self.alphas_cumprod)

    def refuse_zero_terminal_snr(self, sampler: str) -> None:
        """Refuse a schedule without signal at its end, for a sampler whose diffusers class has no such option.

        Raises:
            InputError: The last training timestep holds no signal.
        """
        if self.has_zero_terminal_snr:
            raise InputError(
                f"the scheduler config has rescale_betas_zero_snr=True, which sampler {sampler!r} does not know; take "
                "sampler 'ddim', 'euler' or 'dpmpp-2m'"
            )


def _alphas_cumprod_of(config: SchedulerConfig) -> NDArray[np.float64]:
    if config.trained_betas is not None:
        betas = checked_trained_betas(config.trained_betas, config.num_train_timesteps)
    else:
        betas = named_betas(config.beta_schedule, config.beta_start, config.beta_end, config.num_train_timesteps)
    return alphas_cumprod_from_betas(zero_terminal_snr(betas) if config.rescale_betas_zero_snr else betas)


def _falling_in_unit_interval(levels: NDArray[np.float64]) -> bool:
    return bool(levels[0] < 1.0 and levels[-1] >= 0.0 and np.all(np.diff(levels) < 0.0))


def _range_of(levels: NDArray[np.float64]) -> str:
    return f"{levels.min():g} .. {levels.max():g}" if levels.size else "none"
