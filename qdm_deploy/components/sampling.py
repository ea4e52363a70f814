"""From what a user asks for to a ``Sampling``: made here for every verb, so that equal wishes mean equal samples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from qdm_deploy.artifacts.bundle import Bundle
from qdm_deploy.artifacts.pipeline_spec import Denoiser, PipelineSpec
from qdm_deploy.choices import one_of, within
from qdm_deploy.components.encoders import Encoder, open_encoder
from qdm_deploy.errors import InputError
from qdm_deploy.samplers import SAMPLERS, NoiseSchedule, StepTable, step_table
from qdm_deploy.samplers.sampling import Sampling
from qdm_deploy.samplers.scheduler_config import default_sampler

__all__ = [
    "MAX_STEPS",
    "RunSettings",
    "SamplingMaker",
    "SamplingOptions",
    "refuse_other_model",
    "run_settings",
    "table_for",
]

MAX_STEPS = 10_000
_STEPS, _FEW_STEPS = 50, 4
_FEW_STEP_SAMPLERS = ("lcm", "tcd")
_TEXT_GUIDANCE = 7.5


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How samples are made; every verb that makes some has these options.

    Attributes:
        sampler, steps: one of ``qdm_deploy.samplers.SAMPLERS``, and denoising steps; None: ``run_settings`` chooses.
        eta: share of fresh noise, 0 to 1, for samplers that have one.
        guidance: classifier-free guidance scale; 1 is none; None: ``run_settings`` chooses.
        guidance_rescale: how far guided outputs take back the spread of unguided ones, 0 to 1; text models only.
        conditioning_file: safetensors with states, for models without an encoder in their bundle: each condition
            [N, ...] by name and, for guidance, ``unconditional_`` + its name [...].
    """

    sampler: str | None = None
    steps: int | None = None
    eta: float = 0.0
    guidance: float | None = None
    guidance_rescale: float = 0.0
    conditioning_file: Path | None = None

    def __post_init__(self) -> None:
        """Refuse what no model can do."""
        if self.sampler is not None:
            one_of("sampler", self.sampler, SAMPLERS)
        if self.steps is not None:
            within("steps", self.steps, 1, MAX_STEPS)
        within("eta", self.eta, 0, 1)
        if self.guidance is not None:
            within("guidance", self.guidance, 0, 100)
        within("guidance rescale", self.guidance_rescale, 0, 1)


class Wishes(Protocol):
    """What a user may leave open, on any verb."""

    @property
    def sampler(self) -> str | None:
        """One of ``qdm_deploy.samplers.SAMPLERS``."""
        ...

    @property
    def steps(self) -> int | None:
        """Denoising steps."""
        ...

    @property
    def guidance(self) -> float | None:
        """Classifier-free guidance scale."""
        ...


@dataclass(frozen=True)
class RunSettings:
    """Sampler, denoising steps and guidance scale of a run, nothing left open."""

    sampler: str
    steps: int
    guidance: float


def run_settings(wishes: Wishes, pipeline: PipelineSpec, scheduler_config: Mapping[str, Any]) -> RunSettings:
    """What the user asked for, and the rest as the model's own files say it.

    A latent model runs the sampler that its scheduler file names, a text-conditional one with a guidance of 7.5, as
    diffusers does. A pixel model runs DDIM, because DDPM, which such files name, takes all of the timesteps. LCM and
    TCD take 4 steps, any other sampler 50.

    Raises:
        InputError: the scheduler file is not understood.
    """
    sampler = wishes.sampler or ("ddim" if pipeline.makes == "pixels" else default_sampler(scheduler_config))
    guidance = wishes.guidance
    if guidance is None:
        guidance = _TEXT_GUIDANCE if pipeline.text_encoders else 1.0
    return RunSettings(sampler, wishes.steps or (_FEW_STEPS if sampler in _FEW_STEP_SAMPLERS else _STEPS), guidance)


def table_for(denoiser: Denoiser, schedule: NoiseSchedule, sampler: str, steps: int, eta: float = 0.0) -> StepTable:
    """A sampler's steps in the form that a denoiser's step graph takes.

    Raises:
        InputError: the sampler does not fit the schedule, or a number is out of range.
    """
    return step_table(
        schedule,
        sampler,
        steps,
        eta=eta or None,
        learned_variance=denoiser.learned_variance,
        whole_timesteps=not denoiser.interface.fractional_timesteps,
    )


class SamplingMaker:
    """Makes samplings of one model.

    Args:
        pipeline: the model.
        scheduler_config: diffusers' configuration of its scheduler.
        options: how samples are made.
        encoder: what makes conditions; None opens the pipeline's own.

    Raises:
        InputError: the sampler does not fit the model's schedule, or its conditions cannot be made.
    """

    def __init__(
        self,
        pipeline: PipelineSpec,
        scheduler_config: Mapping[str, Any],
        options: SamplingOptions,
        encoder: Encoder | None = None,
    ) -> None:
        self.pipeline, self.options = pipeline, options
        self.run = run_settings(options, pipeline, scheduler_config)
        self.encoder = encoder or open_encoder(pipeline, options.conditioning_file)
        self.schedule = NoiseSchedule.from_config(scheduler_config)
        self.table = self.table_of(self.run.sampler, self.run.steps, options.eta)

    @classmethod
    def of_bundle(cls, bundle: Bundle, options: SamplingOptions) -> "SamplingMaker":
        """The maker for a bundle's model.

        Raises:
            InputError, BundleError: as above, or the bundle has no scheduler.
        """
        encoder = open_encoder(bundle.pipeline, options.conditioning_file, root=bundle.path)
        return cls(bundle.pipeline, bundle.scheduler_config(), options, encoder)

    def table_of(self, sampler: str, steps: int, eta: float = 0.0) -> StepTable:
        """The table of a sampler for this model."""
        return table_for(self.pipeline.denoiser, self.schedule, sampler, steps, eta)

    def make(
        self,
        seeds: Sequence[int],
        prompts: Sequence[str | None] | None = None,
        negative_prompts: Sequence[str | None] | None = None,
        *,
        first: int = 0,
        table: StepTable | None = None,
    ) -> Sampling:
        """One sample for each seed.

        Args:
            seeds: of the samples.
            prompts: what each shows; None leaves it to the encoder: classes or states in turn.
            negative_prompts: what each does not show.
            first: index of the first sample in its run, for conditions in turn.
            table: other steps than those of the options.

        Raises:
            InputError: the model does not know a prompt, or the options do not fit it.
        """
        wanted = [None] * len(seeds) if prompts is None else prompts
        sampling = Sampling(
            table=self.table if table is None else table,
            seeds=seeds,
            conditioning=self.encoder.encode(wanted, negative_prompts, first=first),
            guidance=self.run.guidance,
            guidance_rescale=self.options.guidance_rescale,
        )
        sampling.check(self.pipeline.interface)
        self.pipeline.denoiser.check_limits(sampling.conditioning.own)
        return sampling


def refuse_other_model(first: Bundle, second: Bundle) -> None:
    """Refuse two bundles in which the same seeds do not mean the same samples.

    Raises:
        InputError: their step graphs take other things, or their schedulers differ.
    """
    if first.pipeline.interface != second.pipeline.interface:
        shapes = [bundle.pipeline.sample_shape for bundle in (first, second)]
        raise InputError(
            f"{first.path} makes {shapes[0]} and {second.path} {shapes[1]}, or they are conditioned on other things: "
            "only bundles of the same kind of model can be compared"
        )
    if first.scheduler_config() != second.scheduler_config():
        raise InputError(
            f"{first.path} and {second.path} have different schedulers, so the same seeds do not mean the same steps"
        )
