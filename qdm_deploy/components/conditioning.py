"""What each sample should show: labels by name or number, text states from a file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from qdm_deploy.artifacts.model_spec import ModelSpec
from qdm_deploy.choices import one_of
from qdm_deploy.errors import InputError
from qdm_deploy.runtime.denoise import Conditioning

__all__ = ["conditioning_of", "label_number", "read_hidden_states"]

_STATES = "encoder_hidden_states"
_NULL_STATES = "unconditional_hidden_states"


def label_number(model: ModelSpec, label: str) -> int:
    """The class of a label given by name (any case) or by number.

    Raises:
        InputError: the model has no classes, or not this one.
    """
    if model.num_classes is None:
        raise InputError(f"{model.name} is not class-conditional; leave --label out")
    if label.isdecimal() and int(label) < model.num_classes:
        return int(label)
    names = model.labels or ()
    for number, name in enumerate(names):
        if name.lower() == label.lower():
            return number
    if names:
        one_of("label", label, names)
    raise InputError(f"unknown label {label!r}; {model.name} has the classes 0 to {model.num_classes - 1}")


def conditioning_of(
    model: ModelSpec,
    count: int,
    *,
    first: int = 0,
    label: str | None = None,
    hidden_states: Mapping[str, NDArray[Any]] | None = None,
) -> Conditioning | None:
    """Conditioning of the samples ``first`` .. ``first + count - 1`` of a run; None for an unconditional model.

    Classes and text states take turns by the sample's index, so it does not matter which samples are made together.

    Raises:
        InputError: the model needs text states and none were given, or they do not fit it.
    """
    if label is not None and model.num_classes is None:
        label_number(model, label)
    if not model.conditional:
        return None
    labels: NDArray[np.int64] | None = None
    states: NDArray[np.float32] | None = None
    index = np.arange(first, first + count, dtype=np.int64)
    null_states: NDArray[np.float32] | None = None
    for item in model.conditioning:
        if item.name == "class_labels":
            number = None if label is None else label_number(model, label)
            in_turn = index % (model.num_classes or 1)
            labels = in_turn if number is None else np.full(count, number, dtype=np.int64)
        else:
            given = (hidden_states or {}).get(_STATES)
            if given is None:
                raise InputError(
                    f"{model.name} is conditioned on {_STATES} {list(item.shape)}; give a safetensors file with them "
                    "(--conditioning)"
                )
            if given.ndim != 3 or given.shape[1:] != item.shape or len(given) == 0:
                raise InputError(
                    f"{_STATES} has shape {list(given.shape)}; {model.name} takes [N, {item.shape[0]}, {item.shape[1]}]"
                )
            states = np.asarray(given, dtype=np.float32)[index % len(given)]
            null = (hidden_states or {}).get(_NULL_STATES)
            if null is not None:
                if null.shape != item.shape:
                    raise InputError(
                        f"{_NULL_STATES} has shape {list(null.shape)}; {model.name} takes {list(item.shape)}"
                    )
                null_states = np.asarray(null, dtype=np.float32)
    return Conditioning(class_labels=labels, encoder_hidden_states=states, null_hidden_states=null_states)


def read_hidden_states(path: Path | None) -> dict[str, NDArray[Any]] | None:
    """Text states from a safetensors file.

    It holds ``encoder_hidden_states`` and, for guidance, ``unconditional_hidden_states``.

    Raises:
        InputError: the file cannot be read, or holds something else.
    """
    if path is None:
        return None
    if not path.is_file():
        raise InputError(f"there is no conditioning file {path}")
    try:
        with safe_open(path, framework="np") as tensors:
            values = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 - no iterator
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read as safetensors ({error})") from error
    if _STATES not in values or set(values) - {_STATES, _NULL_STATES}:
        raise InputError(
            f"{path} holds {', '.join(sorted(values)) or 'nothing'}; a conditioning file holds {_STATES} [N, L, D] "
            f"and, for guidance, {_NULL_STATES} [L, D]"
        )
    for name, value in values.items():
        if not np.isfinite(value).all():
            raise InputError(f"{name} in {path} holds NaN or infinity")
    return values
