"""From what a user asks for to the conditions of a step graph; the only place that knows what conditions mean.

``open_encoder`` gives the encoder of a pipeline. Each one has ``encode``, which takes what every image should show as
text (a label's name or number, a prompt), and what it should not.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from qdm_deploy.artifacts.pipeline_spec import LabelTable, PipelineSpec, StatesFile
from qdm_deploy.choices import one_of
from qdm_deploy.errors import InputError
from qdm_deploy.samplers.conditioning import Conditioning

__all__ = ["Encoder", "LabelEncoder", "NoEncoder", "StatesEncoder", "label_number", "open_encoder"]

_UNCONDITIONAL = "unconditional_"


class Encoder(ABC):
    """Makes conditions."""

    @property
    @abstractmethod
    def can_be_guided(self) -> bool:
        """Whether there is an unconditional twin to guide away from."""

    @abstractmethod
    def encode(
        self,
        prompts: Sequence[str | None],
        negative_prompts: Sequence[str | None] | None = None,
        *,
        first: int = 0,
    ) -> Conditioning:
        """The conditions of some images.

        Args:
            prompts: what each image should show; None leaves the choice to the model: classes or states in turn, by the
                image's index, so it does not matter which images are made together.
            negative_prompts: what each should not show; None or a None is what the model itself takes for "nothing".
            first: index of the first image in its run.

        Raises:
            InputError: the model does not know it.
        """

    def captions(self, prompts: Sequence[str | None], *, first: int = 0) -> list[str | None]:
        """What each image shows, for people to read; None where there is nothing to say."""
        return list(prompts)


class NoEncoder(Encoder):
    """Of an unconditional model: it cannot be asked for anything."""

    def __init__(self, name: str) -> None:
        """``name`` is the model's, for messages."""
        self._name = name

    @property
    def can_be_guided(self) -> bool:
        """There is nothing to guide."""
        return False

    def encode(
        self,
        prompts: Sequence[str | None],
        negative_prompts: Sequence[str | None] | None = None,
        *,
        first: int = 0,
    ) -> Conditioning:
        """No conditions."""
        for prompt in (*prompts, *(negative_prompts or ())):
            if prompt is not None:
                raise InputError(f"{self._name} is unconditional and was asked for {prompt!r}; leave that out")
        return Conditioning()


class LabelEncoder(Encoder):
    """Class labels, by name or number."""

    def __init__(self, spec: LabelTable, name: str) -> None:
        """``name`` is the model's, for messages."""
        self._spec, self._name = spec, name

    @property
    def can_be_guided(self) -> bool:
        """Whether there is a label for "no class"."""
        return self._spec.null_label is not None

    def encode(
        self,
        prompts: Sequence[str | None],
        negative_prompts: Sequence[str | None] | None = None,
        *,
        first: int = 0,
    ) -> Conditioning:
        """One int64 an image."""
        if any(prompt is not None for prompt in negative_prompts or ()):
            raise InputError(f"{self._name} is conditioned on class labels, and knows no negative ones; leave that out")
        own = self.numbers(prompts, first=first)
        null = self._spec.null_label
        unconditional = None if null is None else {self._spec.input: np.array([null], dtype=np.int64)}
        return Conditioning({self._spec.input: own}, unconditional)

    def captions(self, prompts: Sequence[str | None], *, first: int = 0) -> list[str | None]:
        """Names of the classes, or their numbers."""
        names = self._spec.labels
        return [str(number) if names is None else names[number] for number in self.numbers(prompts, first=first)]

    def numbers(self, prompts: Sequence[str | None], *, first: int = 0) -> NDArray[np.int64]:
        """Class of each image, [N] int64."""
        classes = self._spec.num_classes
        return np.array(
            [
                (first + i) % classes if prompt is None else label_number(self._spec, self._name, prompt)
                for i, prompt in enumerate(prompts)
            ],
            dtype=np.int64,
        )


class StatesEncoder(Encoder):
    """States from a safetensors file: each condition [N, ...], and, for guidance, ``unconditional_`` + its name [...].

    ``unconditional_hidden_states`` stands for ``unconditional_encoder_hidden_states`` too.
    """

    def __init__(self, spec: StatesFile, pipeline: PipelineSpec, path: Path) -> None:
        """Read the file.

        Raises:
            InputError: it cannot be read, or holds something else.
        """
        self._name = pipeline.name
        self._own: dict[str, NDArray[Any]] = {}
        self._unconditional: dict[str, NDArray[Any]] = {}
        values = _read_tensors(path)
        for name in spec.inputs:
            shape = pipeline.interface[name].row_shape
            short = name.removeprefix("encoder_")
            twin = next((key for key in (_UNCONDITIONAL + name, _UNCONDITIONAL + short) if key in values), None)
            own = values.pop(name, None)
            if own is None or own.shape[1:] != shape or len(own) == 0:
                given = "nothing" if own is None else list(own.shape)
                raise InputError(f"{path} has {given} as {name}; {self._name} takes {['N', *shape]}")
            self._own[name] = np.ascontiguousarray(own, np.float32)
            if twin is not None:
                null = values.pop(twin)
                if null.shape != shape:
                    raise InputError(f"{path} has {list(null.shape)} as {twin}; {self._name} takes {list(shape)}")
                self._unconditional[name] = np.ascontiguousarray(null[None], np.float32)
        if values:
            raise InputError(
                f"{path} also holds {', '.join(sorted(values))}; a conditioning file holds {', '.join(spec.inputs)} "
                f"and, for guidance, {_UNCONDITIONAL}*"
            )

    @property
    def can_be_guided(self) -> bool:
        """Whether the file has the states of the unconditional twin."""
        return set(self._unconditional) == set(self._own)

    def encode(
        self,
        prompts: Sequence[str | None],
        negative_prompts: Sequence[str | None] | None = None,
        *,
        first: int = 0,
    ) -> Conditioning:
        """The states in turn."""
        for prompt in (*prompts, *(negative_prompts or ())):
            if prompt is not None:
                raise InputError(
                    f"{self._name} has no text encoder in its bundle, and {prompt!r} was asked for; the states in the "
                    "conditioning file say what it shows"
                )
        index = np.arange(first, first + len(prompts))
        own = {name: values[index % len(values)] for name, values in self._own.items()}
        return Conditioning(own, self._unconditional if self.can_be_guided else None)


def open_encoder(pipeline: PipelineSpec, conditioning_file: Path | None = None) -> Encoder:
    """The encoder of a pipeline.

    Args:
        pipeline: of an opened bundle, or of a checkpoint.
        conditioning_file: states for a model whose encoder is not in the bundle.

    Raises:
        InputError: it needs a file and none was given, or the other way round, or the file does not fit.
    """
    spec = pipeline.encoder
    if isinstance(spec, StatesFile):
        if conditioning_file is None:
            shapes = ", ".join(
                f"{name} [N, {', '.join(map(str, pipeline.interface[name].row_shape))}]" for name in spec.inputs
            )
            raise InputError(
                f"{pipeline.name} is conditioned on states and has no encoder; give a safetensors file with {shapes} "
                "(--conditioning)"
            )
        return StatesEncoder(spec, pipeline, conditioning_file)
    if conditioning_file is not None:
        raise InputError(f"{pipeline.name} takes no states; leave the conditioning file {conditioning_file} out")
    return NoEncoder(pipeline.name) if spec is None else LabelEncoder(spec, pipeline.name)


def label_number(spec: LabelTable, model: str, label: str) -> int:
    """The class of a label given by name (any case) or by number.

    Raises:
        InputError: there is no such class.
    """
    # Names come first: a label may be called "7".
    for number, name in enumerate(spec.labels or ()):
        if name.casefold() == label.casefold():
            return number
    if label.isdecimal() and int(label) < spec.num_classes:
        return int(label)
    if spec.labels:
        one_of("label", label, spec.labels)
    raise InputError(f"unknown label {label!r}; {model} has the classes 0 to {spec.num_classes - 1}")


def _read_tensors(path: Path) -> dict[str, NDArray[Any]]:
    if not path.is_file():
        raise InputError(f"there is no conditioning file {path}")
    try:
        with safe_open(path, framework="np") as tensors:
            values: Mapping[str, NDArray[Any]] = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 - no iterator
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read as safetensors ({error})") from error
    for name, value in values.items():
        if not np.isfinite(value).all():
            raise InputError(f"{name} in {path} holds NaN or infinity")
    return dict(values)
