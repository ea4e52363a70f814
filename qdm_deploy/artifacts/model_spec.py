"""What a runtime must know of a diffusion model: shapes, conditioning, timesteps; never its layers."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["ConditioningInput", "ModelSpec"]


class ConditioningInput(BaseModel):
    """One conditioning input of the step graph; its first axis is the batch."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["class_labels", "encoder_hidden_states"]
    dtype: Literal["int64", "float32"]
    shape: tuple[int, ...] = Field(
        description="Shape of one sample: () for a label, (tokens, channels) for text states."
    )


class ModelSpec(BaseModel):
    """The model as its sampler and its step graph see it.

    ``sample_shape`` is [C, H, W] of the tensor that is denoised: pixels in [-1, 1] or latents.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    sample_shape: tuple[int, int, int]
    sample_kind: Literal["pixels", "latents"] = "pixels"
    num_train_timesteps: int = Field(gt=0)
    conditioning: tuple[ConditioningInput, ...] = ()
    num_classes: int | None = Field(default=None, description="Class labels a user may ask for: 0 .. num_classes - 1.")
    labels: tuple[str, ...] | None = Field(default=None, description="Names of the class labels, in order.")
    null_label: int | None = Field(default=None, description="The label that means 'no class'; needed for guidance.")
    learned_variance: bool = False

    @model_validator(mode="after")
    def _labels_match_classes(self) -> Self:
        if self.labels is not None and len(self.labels) != self.num_classes:
            raise ValueError(f"{len(self.labels)} label names were given for {self.num_classes} classes")
        return self

    @property
    def conditional(self) -> bool:
        """Whether the step graph has conditioning inputs, and with them the guidance inputs."""
        return bool(self.conditioning)

    @property
    def num_coefficients(self) -> int:
        """Columns of the sampler's coefficient table: 7, or 9 for a learned variance."""
        return 9 if self.learned_variance else 7
