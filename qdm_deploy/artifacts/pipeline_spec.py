"""What a bundle holds: a pipeline of components, folders named as diffusers names them, and how they fit together.

A runtime knows of each component what it takes and gives, and never its layers.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from qdm_deploy.artifacts.step_interface import StepInterface
from qdm_deploy.errors import InputError

__all__ = ["Component", "Denoiser", "Encoder", "LabelTable", "PipelineSpec", "StatesFile"]

FolderName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=40)]
InputName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=60)]
# What a person reads: one line, nothing that a terminal or a page would take for a command.
Text = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f-\x9f<>]+$")]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Denoiser(_Frozen):
    """A U-Net with the sampler's update behind it: one step graph for each target, and the plan they run.

    Attributes:
        name: its folder.
        interface: the step graphs' inputs and outputs.
        num_train_timesteps: T; timesteps lie in [0, T - 1].
        learned_variance: the network predicts the variance of a step too.
        limits: how many values each condition of whole numbers has, from 0 on.
        first_timestep, last_timestep: where it takes over and where it hands on: several denoisers may share a run.
    """

    kind: Literal["denoiser"] = "denoiser"
    name: FolderName = "unet"
    interface: StepInterface
    num_train_timesteps: int = Field(gt=0)
    learned_variance: bool = False
    limits: dict[InputName, int] = Field(default_factory=dict)
    first_timestep: int | None = None
    last_timestep: int = 0

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """[C, H, W] of what is denoised, at the model's own size."""
        return self.interface.sample_shape

    @property
    def conditional(self) -> bool:
        """Whether it can be told what to show."""
        return bool(self.interface.conditions)

    def check_limits(self, conditions: Mapping[str, NDArray[Any]]) -> None:
        """Refuse whole numbers that the model has no embedding for.

        Raises:
            InputError: a condition holds one.
        """
        for name, limit in self.limits.items():
            wrong = [value for value in conditions[name].ravel().tolist() if not 0 <= value < limit]
            if wrong:
                raise InputError(f"{name} holds {wrong[0]}; this model knows 0 to {limit - 1}")


class LabelTable(_Frozen):
    """An encoder of class labels.

    Attributes:
        input: the condition that it makes, an int64 a row.
        num_classes: labels a user may ask for, 0 .. num_classes - 1.
        labels: their names, in order; None where they have none.
        null_label: the label that means "no class"; None where guidance is not possible.
    """

    kind: Literal["labels"] = "labels"
    input: InputName
    num_classes: int = Field(gt=0)
    labels: tuple[Text, ...] | None = None
    null_label: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _labels_match_classes(self) -> Self:
        if self.labels is not None and len(self.labels) != self.num_classes:
            raise ValueError(f"{len(self.labels)} label names were given for {self.num_classes} classes")
        return self


class StatesFile(_Frozen):
    """An encoder that is not in the bundle: its states come from a file that the user gives.

    Attributes:
        inputs: the conditions that the file holds, a float32 array each.
    """

    kind: Literal["states"] = "states"
    inputs: tuple[InputName, ...] = Field(min_length=1)


Encoder = LabelTable | StatesFile
Component = Annotated[Denoiser | LabelTable | StatesFile, Field(discriminator="kind")]


class PipelineSpec(_Frozen):
    """The model as people and runtimes see it.

    Attributes:
        name: what people call it.
        components: what it is made of; one denoiser at least.
        makes: what the denoiser's finished sample is: pixels in [-1, 1], or latents that a decoder reads.
    """

    name: Text
    components: tuple[Component, ...] = Field(min_length=1)
    makes: Literal["pixels", "latents"] = "pixels"

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        denoisers = [part for part in self.components if isinstance(part, Denoiser)]
        encoders = [part for part in self.components if isinstance(part, (LabelTable, StatesFile))]
        if not denoisers:
            raise ValueError("a pipeline has at least one denoiser, and there is none")
        if len(encoders) > 1:
            raise ValueError(f"a pipeline has one encoder at most, and there are {len(encoders)}")
        made = set() if not encoders else set(_made_by(encoders[0]))
        for part in denoisers:
            wanted = {spec.name for spec in part.interface.conditions}
            if not wanted <= made:
                raise ValueError(f"{part.name} is conditioned on {sorted(wanted - made)}, which no encoder makes")
        return self

    @property
    def denoiser(self) -> Denoiser:
        """The denoiser, or the first of several."""
        return next(part for part in self.components if isinstance(part, Denoiser))

    @property
    def encoder(self) -> Encoder | None:
        """What makes the conditions; None for an unconditional model."""
        return next((part for part in self.components if isinstance(part, (LabelTable, StatesFile))), None)

    @property
    def interface(self) -> StepInterface:
        """The step graph's inputs and outputs."""
        return self.denoiser.interface

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """[C, H, W] of what is denoised, at the model's own size."""
        return self.denoiser.sample_shape

    @property
    def conditional(self) -> bool:
        """Whether the model can be told what to show."""
        return self.denoiser.conditional


def _made_by(encoder: Encoder) -> tuple[str, ...]:
    return (encoder.input,) if isinstance(encoder, LabelTable) else encoder.inputs
