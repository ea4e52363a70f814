"""What a bundle holds: a pipeline of components, folders named as diffusers names them, and how they fit together.

A runtime knows of each component what it takes and gives, and never its layers.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from qdm_deploy.artifacts.step_interface import StepInterface
from qdm_deploy.errors import InputError

__all__ = ["Component", "Decoder", "Denoiser", "Encoder", "LabelTable", "PipelineSpec", "StatesFile", "TextEncoder"]

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


# Prompts may be as long as this many of a text encoder's own lengths.
MAX_CHUNKS = 3
TextState = Literal["last_hidden_state", "penultimate_hidden_state", "pooled"]


class TextEncoder(_Frozen):
    """A CLIP text model: ``NAME/model.onnx``, and the tokenizer that writes its input, ``TOKENIZER/tokenizer.json``.

    Several of them may make one condition: their states stand beside each other on its last axis, in the order of the
    components.

    Attributes:
        name: its folder.
        tokenizer: folder of its tokenizer.
        input: the condition that it makes, [max_length or a multiple, width] float32 a row.
        max_length: tokens of a row of the graph's ``input_ids``, with the first and the last.
        width: values of a token's state.
        layers: transformer layers.
        outputs: what the graph gives: ``last_hidden_state`` and ``penultimate_hidden_state`` [B, max_length, width],
            both after the final layer norm, and ``pooled`` [B, width].
        vocabulary: ids of tokens lie below it.
        bos_id, eos_id, pad_id: the first token of a row, the one that ends its text, and what fills it up.
    """

    kind: Literal["text_encoder"] = "text_encoder"
    name: FolderName = "text_encoder"
    tokenizer: FolderName = "tokenizer"
    input: InputName = "encoder_hidden_states"
    max_length: int = Field(default=77, ge=3)
    width: int = Field(gt=0)
    layers: int = Field(gt=0)
    outputs: tuple[TextState, ...] = ("last_hidden_state", "penultimate_hidden_state", "pooled")
    vocabulary: int = Field(gt=0)
    bos_id: int = Field(ge=0)
    eos_id: int = Field(ge=0)
    pad_id: int = Field(ge=0)

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        for name, number in (("bos_id", self.bos_id), ("eos_id", self.eos_id), ("pad_id", self.pad_id)):
            if number >= self.vocabulary:
                raise ValueError(f"{name} {number} is not in a vocabulary of {self.vocabulary}")
        if len(set(self.outputs)) != len(self.outputs) or "last_hidden_state" not in self.outputs:
            raise ValueError(f"the outputs {list(self.outputs)} must hold last_hidden_state, and each one once")
        return self


class Decoder(_Frozen):
    """What makes pictures of latents: one float graph, ``model.onnx`` in its folder.

    The graph takes latents as the sampler leaves them, of any size, and gives values in [-1, 1]. What undoes the
    latents' scaling is inside it; the scaling stands here for whoever makes latents of pictures.

    Attributes:
        name: its folder.
        latent_channels: channels that it takes.
        channels: channels of a picture.
        factor: pixels of a picture's side for each latent.
        scaling_factor: what the autoencoder's own latents were multiplied by.
        shift_factor: what was taken from them before that.
        latents_mean, latents_std: of each channel; both or neither.
    """

    kind: Literal["decoder"] = "decoder"
    name: FolderName = "vae_decoder"
    latent_channels: int = Field(gt=0)
    channels: int = Field(default=3, gt=0)
    factor: int = Field(gt=0)
    scaling_factor: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    shift_factor: float = Field(default=0.0, allow_inf_nan=False)
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None

    @model_validator(mode="after")
    def _one_mean_a_channel(self) -> Self:
        if (self.latents_mean is None) != (self.latents_std is None):
            raise ValueError("latents_mean and latents_std go together, and only one was given")
        for name, values in (("latents_mean", self.latents_mean), ("latents_std", self.latents_std)):
            if values is not None and len(values) != self.latent_channels:
                raise ValueError(f"{name} has {len(values)} values for {self.latent_channels} channels")
        return self

    def picture_shape(self, latent_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """[C, H, W] of the picture that latents of this shape become."""
        _, height, width = latent_shape
        return self.channels, height * self.factor, width * self.factor


Encoder = LabelTable | StatesFile | TextEncoder
Component = Annotated[Denoiser | LabelTable | StatesFile | TextEncoder | Decoder, Field(discriminator="kind")]


class PipelineSpec(_Frozen):
    """The model as people and runtimes see it.

    Attributes:
        name: what people call it.
        components: what it is made of; one denoiser at least, and any number of text encoders or one other encoder.
        makes: what the denoiser's finished sample is: pixels in [-1, 1], or latents that a decoder reads.
    """

    name: Text
    components: tuple[Component, ...] = Field(min_length=1)
    makes: Literal["pixels", "latents"] = "pixels"

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        denoisers = [part for part in self.components if isinstance(part, Denoiser)]
        encoders = self._encoders
        if not denoisers:
            raise ValueError("a pipeline has at least one denoiser, and there is none")
        if len(encoders) > 1 and len(self.text_encoders) < len(encoders):
            raise ValueError(f"a pipeline has text encoders or one other encoder, and there are {len(encoders)}")
        folders = [*(part.name for part in denoisers), *(part.name for part in self.text_encoders)]
        twice = sorted({name for name in folders if folders.count(name) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)} is the folder of two components")
        decoders = [part for part in self.components if isinstance(part, Decoder)]
        if len(decoders) > 1:
            raise ValueError(f"a pipeline has one decoder at most, and there are {len(decoders)}")
        if decoders and self.makes != "latents":
            raise ValueError(f"the pipeline makes {self.makes}, and {decoders[0].name} reads latents")
        made = {name for encoder in encoders for name in _made_by(encoder)}
        for part in denoisers:
            wanted = {spec.name for spec in part.interface.conditions}
            if not wanted <= made:
                raise ValueError(f"{part.name} is conditioned on {sorted(wanted - made)}, which no encoder makes")
            for name in wanted:
                self._check_text(part, name)
            for decoder in decoders:
                if part.sample_shape[0] != decoder.latent_channels:
                    raise ValueError(
                        f"{part.name} makes latents of {part.sample_shape[0]} channels, and {decoder.name} reads "
                        f"{decoder.latent_channels}"
                    )
        return self

    def _check_text(self, denoiser: Denoiser, name: str) -> None:
        makers = [encoder for encoder in self.text_encoders if encoder.input == name]
        if not makers:
            return
        lengths = sorted({encoder.max_length for encoder in makers})
        if len(lengths) > 1:
            raise ValueError(f"{name} comes from text encoders with {' and '.join(map(str, lengths))} tokens")
        width, shape = sum(encoder.width for encoder in makers), denoiser.interface[name].row_shape
        allowed = [(count * lengths[0], width) for count in range(1, MAX_CHUNKS + 1)]
        if shape not in allowed or denoiser.interface[name].dtype != "float32":
            raise ValueError(
                f"{denoiser.name} takes {denoiser.interface[name].dtype} {list(shape)} as {name}; its text encoders "
                f"make float32 {' or '.join(str(list(one)) for one in allowed)}"
            )

    @property
    def denoiser(self) -> Denoiser:
        """The denoiser, or the first of several."""
        return next(part for part in self.components if isinstance(part, Denoiser))

    @property
    def encoder(self) -> Encoder | None:
        """What makes the conditions, or the first of several text encoders; None for an unconditional model."""
        return next(iter(self._encoders), None)

    @property
    def text_encoders(self) -> tuple[TextEncoder, ...]:
        """What makes conditions of prompts, in order; empty where there are other conditions or none."""
        return tuple(part for part in self.components if isinstance(part, TextEncoder))

    @property
    def _encoders(self) -> tuple[Encoder, ...]:
        return tuple(part for part in self.components if not isinstance(part, (Denoiser, Decoder)))

    @property
    def decoder(self) -> Decoder | None:
        """What makes pictures of latents; None where the denoiser makes them itself, or nothing does."""
        return next((part for part in self.components if isinstance(part, Decoder)), None)

    @property
    def picture_shape(self) -> tuple[int, int, int] | None:
        """[C, H, W] of a picture at the model's own size; None where it makes latents and nothing reads them."""
        if self.makes == "pixels":
            return self.sample_shape
        return None if self.decoder is None else self.decoder.picture_shape(self.sample_shape)

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
    return encoder.inputs if isinstance(encoder, StatesFile) else (encoder.input,)
