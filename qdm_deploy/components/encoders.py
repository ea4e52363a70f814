"""From what a user asks for to the conditions of a step graph; the only place that knows what conditions mean.

``open_encoder`` gives the encoder of a pipeline. Each one has ``encode``, which takes what every image should show as
text (a label's name or number, a prompt), and what it should not.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from qdm_deploy.artifacts.pipeline_spec import LabelTable, PipelineSpec, StatesFile, TextEncoder
from qdm_deploy.choices import one_of
from qdm_deploy.components.prompt_lists import PromptList, packaged_prompts
from qdm_deploy.components.prompts import PromptOptions
from qdm_deploy.components.text_states import TextStates
from qdm_deploy.errors import InputError
from qdm_deploy.samplers.conditioning import Conditioning

__all__ = ["Encoder", "LabelEncoder", "NoEncoder", "PromptEncoder", "StatesEncoder", "label_number", "open_encoder"]

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

    def negatives(
        self, prompts: Sequence[str | None], negative_prompts: Sequence[str | None] | None = None, *, first: int = 0
    ) -> list[str | None]:
        """What each image does not show; None where nobody said it."""
        return [None] * len(prompts) if negative_prompts is None else list(negative_prompts)


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
                raise InputError(f"{path} has {given} as {name}; {self._name} takes [N, {', '.join(map(str, shape))}]")
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


class PromptEncoder(Encoder):
    """Prompts, by the text encoders of a bundle: one or more, whose states of a token stand beside each other.

    Where nobody says what an image should show, prompts of a list are taken in turn, by the image's index, with their
    negative ones. The text encoders are opened when the first prompt comes.

    Args:
        pipeline: the model.
        root: its bundle's folder; None where only questions are asked of it.
        options: how prompts are read.
        prompts: what is taken in turn; None: the packaged list.
    """

    def __init__(
        self,
        pipeline: PipelineSpec,
        root: Path | None,
        options: PromptOptions | None = None,
        prompts: PromptList | None = None,
    ) -> None:
        self._pipeline, self._root = pipeline, root
        self._listed = prompts or packaged_prompts("measuring")
        self.options = options or PromptOptions()
        # A list, which encoders with other options share.
        self._opened: list[TextStates] = []
        self._lock = threading.Lock()

    @property
    def can_be_guided(self) -> bool:
        """An empty prompt is always there."""
        return True

    def with_options(self, options: PromptOptions) -> "PromptEncoder":
        """The same text encoders, and what they keep, for prompts that are read in another way."""
        other = PromptEncoder(self._pipeline, self._root, options, self._listed)
        other._opened, other._lock = self._opened, self._lock
        return other

    def encode(
        self,
        prompts: Sequence[str | None],
        negative_prompts: Sequence[str | None] | None = None,
        *,
        first: int = 0,
    ) -> Conditioning:
        """States [N, tokens, width] float32; the unconditional ones have one row where all images share it."""
        if negative_prompts is not None and len(negative_prompts) not in (1, len(prompts)):
            raise InputError(
                f"{len(negative_prompts)} negative prompts were given for {len(prompts)} images; give one for each, or "
                "one for all"
            )
        own = [text or "" for text in self.captions(prompts, first=first)]
        negative = [text or "" for text in self.negatives(prompts, negative_prompts, first=first)]
        shared = negative[:1] if len(set(negative)) == 1 else negative
        return Conditioning(self._rows(own), self._rows(shared))

    def captions(self, prompts: Sequence[str | None], *, first: int = 0) -> list[str | None]:
        """The prompts."""
        listed, _ = self._listed.in_turn(len(prompts), first)
        return [known if prompt is None else prompt for prompt, known in zip(prompts, listed, strict=True)]

    def negatives(
        self, prompts: Sequence[str | None], negative_prompts: Sequence[str | None] | None = None, *, first: int = 0
    ) -> list[str | None]:
        """Those that were given, or those of the prompts that were taken in turn."""
        if negative_prompts is not None:
            return list(negative_prompts)
        _, listed = self._listed.in_turn(len(prompts), first)
        return [known if prompt is None else None for prompt, known in zip(prompts, listed, strict=True)]

    def _rows(self, texts: Sequence[str]) -> dict[str, NDArray[Any]]:
        parts: dict[str, list[NDArray[np.float32]]] = {}
        for encoder in self._encoders():
            shape = (len(texts), *self._pipeline.interface[encoder.spec.input].row_shape[:1], encoder.spec.width)
            states = np.empty(shape, np.float32)
            for row, text in zip(states, texts, strict=True):
                row[:] = encoder.of(text, self.options)
            parts.setdefault(encoder.spec.input, []).append(states)
        return {name: found[0] if len(found) == 1 else np.concatenate(found, axis=-1) for name, found in parts.items()}

    def _encoders(self) -> list[TextStates]:
        with self._lock:
            if not self._opened:
                if self._root is None:
                    raise InputError(f"the text encoders of {self._pipeline.name} are in its bundle; give its folder")
                interface = self._pipeline.interface
                self._opened += [
                    TextStates(self._root, spec, interface[spec.input].row_shape[0] // spec.max_length)
                    for spec in self._pipeline.text_encoders
                ]
            return self._opened


def open_encoder(
    pipeline: PipelineSpec,
    conditioning_file: Path | None = None,
    *,
    root: Path | None = None,
    options: PromptOptions | None = None,
    prompts: PromptList | None = None,
) -> Encoder:
    """The encoder of a pipeline.

    Args:
        pipeline: of an opened bundle, or of a checkpoint.
        conditioning_file: states for a model whose encoder is not in the bundle.
        root: the bundle's folder, which text encoders are read from when the first prompt comes.
        options: how prompts are read; text encoders only.
        prompts: what a text-conditional model shows where nobody says it; None: the packaged list.

    Raises:
        InputError: it needs a file and none was given, or the other way round, or the file does not fit, or it reads no
            prompts and options were given.
    """
    spec = pipeline.encoder
    if options is not None and not isinstance(spec, TextEncoder):
        raise InputError(f"{pipeline.name} has no text encoder in its bundle; leave clip_skip and weighting out")
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
    if isinstance(spec, TextEncoder):
        return PromptEncoder(pipeline, root, options, prompts)
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
