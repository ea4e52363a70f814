"""From what a user asks for to a ``Sampling``: made here for every verb, so that equal wishes mean equal samples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdm_deploy.artifacts.bundle import Bundle
from qdm_deploy.artifacts.pipeline_spec import Denoiser, PipelineSpec
from qdm_deploy.choices import one_of, within
from qdm_deploy.components.encoders import Encoder, open_encoder
from qdm_deploy.errors import InputError
from qdm_deploy.samplers import SAMPLERS, NoiseSchedule, StepTable, step_table
from qdm_deploy.samplers.sampling import Sampling

__all__ = ["MAX_STEPS", "SamplingMaker", "SamplingOptions", "refuse_other_model", "table_for"]

MAX_STEPS = 10_000


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How samples are made; every verb that makes some has these options.

    Attributes:
        sampler: one of ``qdm_deploy.samplers.SAMPLERS``.
        steps: denoising steps.
        eta: share of fresh noise, 0 to 1, for samplers that have one.
        guidance: classifier-free guidance scale; 1 is none.
        guidance_rescale: how far guided outputs take back the spread of unguided ones, 0 to 1; text models only.
        conditioning_file: safetensors with states, for models without an encoder in their bundle: each condition
            [N, ...] by name and, for guidance, ``unconditional_`` + its name [...].
    """

    sampler: str = "ddim"
    steps: int = 50
    eta: float = 0.0
    guidance: float = 1.0
    guidance_rescale: float = 0.0
    conditioning_file: Path | None = None

    def __post_init__(self) -> None:
        """Refuse what no model can do."""
        one_of("sampler", self.sampler, SAMPLERS)
        within("steps", self.steps, 1, MAX_STEPS)
        within("eta", self.eta, 0, 1)
        within("guidance", self.guidance, 0, 100)
        within("guidance rescale", self.guidance_rescale, 0, 1)


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
        self.encoder = encoder or open_encoder(pipeline, options.conditioning_file)
        self.schedule = NoiseSchedule.from_config(scheduler_config)
        self.table = self.table_of(options.sampler, options.steps, options.eta)

    @classmethod
    def of_bundle(cls, bundle: Bundle, options: SamplingOptions) -> "SamplingMaker":
        """The maker for a bundle's model.

        Raises:
            InputError, BundleError: as above, or the bundle has no scheduler.
        """
        return cls(bundle.pipeline, bundle.scheduler_config(), options)

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
            guidance=self.options.guidance,
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
