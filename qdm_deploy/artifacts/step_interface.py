"""Inputs and outputs of a step graph as data: everyone who feeds or reads one loops over this value.

A step graph takes one denoising step for a batch of rows. The first axis of every tensor is the row; a spec says the
rest. What an input is for is its ``role``:

- ``state``: what the loop carries from one step to the next. Each has an output that is its next value (``feedback``).
- ``step``: what the sampler says of the step: the timestep and the coefficients of its table.
- ``noise``: fresh Gaussian noise.
- ``condition``: what the image should show; made by an encoder, and its meaning is nobody else's.
- ``guidance``: how strongly, of conditional models only.
- ``link``: the rows in which a guided image's two rows find each other, of conditional models only.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["DType", "Role", "StepInterface", "TensorSpec", "role_of_input"]

DType = Literal["float32", "int64"]
Role = Literal["state", "step", "noise", "condition", "guidance", "link"]

# Every other input of a step graph is a condition: the set of those is open.
_ROLES: dict[str, Role] = {
    "sample": "state",
    "history": "state",
    "timestep": "step",
    "coefficients": "step",
    "noise": "noise",
    "guidance": "guidance",
    "guidance_rescale": "guidance",
    "unconditional_row": "link",
    "owner_row": "link",
}
_FEEDBACK = {"sample": "next_sample", "history": "next_history"}
# Predictions that the history holds, the newest first; the samplers' tables say what goes in.
HISTORY = 3


def role_of_input(name: str) -> Role:
    """What an input of a step graph is for, by its name."""
    return _ROLES.get(name, "condition")


class TensorSpec(BaseModel):
    """One input or output.

    Attributes:
        name: as in the graph.
        dtype: "float32" or "int64".
        row_shape: shape of one row at the model's own size.
        role: what it is for; an output has that of what it feeds, or None.
        neutral: what a row that does nothing holds. A link's is the row's own index instead.
        spatial: whether the last two axes are the height and width of the sample.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=60)
    dtype: DType = "float32"
    row_shape: tuple[int, ...] = ()
    role: Role | None = None
    neutral: float = 0.0
    spatial: bool = False

    @property
    def numpy_dtype(self) -> "np.dtype[np.float32] | np.dtype[np.int64]":
        """The dtype as numpy's."""
        return np.dtype(np.float32) if self.dtype == "float32" else np.dtype(np.int64)

    def resized(self, height: int, width: int) -> "TensorSpec":
        """The same tensor for a sample of another size."""
        if not self.spatial:
            return self
        return self.model_copy(update={"row_shape": (*self.row_shape[:-2], height, width)})


class StepInterface(BaseModel):
    """What a step graph takes and gives, in the graph's order."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @model_validator(mode="after")
    def _is_a_step(self) -> Self:
        names = [spec.name for spec in (*self.inputs, *self.outputs)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)} is named twice")
        missing = [name for name in ("sample", "history", "timestep", "coefficients", "noise") if name not in names]
        missing += [name for name in ("next_sample", "next_history", "x0") if name not in names]
        if missing:
            raise ValueError(f"a step graph has no {', '.join(missing)}")
        if self.of_role("condition") and not {"guidance", "unconditional_row", "owner_row"} <= set(names):
            raise ValueError("a conditional step graph has no guidance, unconditional_row or owner_row")
        return self

    @classmethod
    def of(
        cls,
        sample_shape: tuple[int, int, int],
        conditions: Sequence[TensorSpec] = (),
        *,
        coefficients: int,
        fractional_timesteps: bool = False,
        rescaled_guidance: bool = False,
    ) -> Self:
        """The interface of a denoiser.

        Args:
            sample_shape: [C, H, W] of what is denoised.
            conditions: its conditioning inputs; none for an unconditional model.
            coefficients: columns of the sampler's table.
            fractional_timesteps: the timestep is float32, and any number from 0 to T - 1 has a meaning; otherwise it is
                int64, a row of the graph's time table.
            rescaled_guidance: guided outputs can be rescaled (arXiv 2305.08891, section 3.4).
        """
        channels, height, width = sample_shape

        def image(name: str, role: Role | None, count: int = 1) -> TensorSpec:
            return TensorSpec(name=name, row_shape=(count * channels, height, width), role=role, spatial=True)

        inputs = [
            image("sample", "state"),
            TensorSpec(name="timestep", dtype="float32" if fractional_timesteps else "int64", role="step"),
            TensorSpec(name="coefficients", row_shape=(coefficients,), role="step"),
            image("noise", "noise"),
            image("history", "state", HISTORY),
            *(spec.model_copy(update={"role": "condition"}) for spec in conditions),
        ]
        if conditions:
            inputs.append(TensorSpec(name="guidance", role="guidance", neutral=1.0))
            if rescaled_guidance:
                inputs.append(TensorSpec(name="guidance_rescale", role="guidance"))
            inputs += [TensorSpec(name=name, dtype="int64", role="link") for name in ("unconditional_row", "owner_row")]
        outputs = [image("next_sample", "state"), image("x0", None), image("next_history", "state", HISTORY)]
        return cls(inputs=tuple(inputs), outputs=tuple(outputs))

    def __getitem__(self, name: str) -> TensorSpec:
        """The input or output of that name; KeyError where there is none."""
        for spec in (*self.inputs, *self.outputs):
            if spec.name == name:
                return spec
        raise KeyError(name)

    def of_role(self, *roles: Role) -> tuple[TensorSpec, ...]:
        """The inputs that are there for one of these."""
        return tuple(spec for spec in self.inputs if spec.role in roles)

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs, in the graph's order."""
        return tuple(spec.name for spec in self.inputs)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the outputs, in the graph's order."""
        return tuple(spec.name for spec in self.outputs)

    @property
    def feedback(self) -> tuple[tuple[str, str], ...]:
        """Each state input with the output that is its next value."""
        return tuple((spec.name, _FEEDBACK[spec.name]) for spec in self.of_role("state"))

    @property
    def conditions(self) -> tuple[TensorSpec, ...]:
        """The conditioning inputs."""
        return self.of_role("condition")

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """[C, H, W] of what is denoised."""
        channels, height, width = self["sample"].row_shape
        return channels, height, width

    @property
    def fractional_timesteps(self) -> bool:
        """Whether a timestep between two whole ones has a meaning."""
        return self["timestep"].dtype == "float32"

    @property
    def num_coefficients(self) -> int:
        """Columns of the sampler's table."""
        return self["coefficients"].row_shape[0]

    def resized(self, height: int, width: int) -> "StepInterface":
        """The same graph for samples of another size."""
        return StepInterface(
            inputs=tuple(spec.resized(height, width) for spec in self.inputs),
            outputs=tuple(spec.resized(height, width) for spec in self.outputs),
        )

    def rows(self, count: int) -> "dict[str, np.ndarray]":
        """Arrays [count, ...] for every input, each row neutral: nothing of it reaches another row."""
        return {
            spec.name: np.arange(count, dtype=np.int64)
            if spec.role == "link"
            else np.full((count, *spec.row_shape), spec.neutral, spec.numpy_dtype)
            for spec in self.inputs
        }

    def __iter__(self) -> Iterator[TensorSpec]:  # type: ignore[override]  # pydantic's own gives pairs of fields
        """The inputs, in the graph's order."""
        return iter(self.inputs)
