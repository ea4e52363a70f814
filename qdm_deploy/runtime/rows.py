"""From samples to rows of a batch: conditioning, and how a guided sample's two rows find each other.

A guided sample holds two rows side by side: its own, and its unconditional twin's.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.artifacts.model_spec import ModelSpec
from qdm_deploy.errors import InputError

__all__ = ["Conditioning", "conditioning_rows", "row_links"]


@dataclass(frozen=True)
class Conditioning:
    """What each sample should show, and what "nothing in particular" means to the model.

    Attributes:
        class_labels: [N] integers, or None.
        encoder_hidden_states: [N, L, D] float32, or None.
        null_label: class label of the unconditional twin; None takes the model's own.
        null_hidden_states: [L, D] float32 text states of the unconditional twin (those of the empty prompt).
    """

    class_labels: NDArray[np.integer[Any]] | None = None
    encoder_hidden_states: NDArray[np.float32] | None = None
    null_label: int | None = None
    null_hidden_states: NDArray[np.float32] | None = None


def row_links(rows: int, rows_each: int) -> dict[str, NDArray[np.int64]]:
    """Where each row finds its unconditional twin and its owner, counted from the start of the batch that holds it."""
    index = np.arange(rows)
    owner = index - index % rows_each
    return {"unconditional_row": owner + rows_each - 1, "owner_row": owner}


def conditioning_rows(
    model: ModelSpec, conditioning: Conditioning | None, count: int, twin: bool
) -> dict[str, NDArray[Any]]:
    """Conditioning inputs of all rows: the samples' own, and after each its unconditional twin's when guided.

    Args:
        model: what conditioning it takes.
        conditioning: of ``count`` samples; None where the model takes none.
        count: samples.
        twin: two rows a sample instead of one.

    Returns:
        For each conditioning input its rows, [count or 2 count, ...] int64 or float32.

    Raises:
        InputError: the conditioning does not fit the model, or a twin has nothing to be conditioned on.
    """
    given = conditioning or Conditioning()
    wanted = {item.name: item.shape for item in model.conditioning}
    for name in ("class_labels", "encoder_hidden_states"):
        value = getattr(given, name)
        if value is not None and name not in wanted:
            raise InputError(
                f"the model {model.name!r} takes no {name}; it takes {', '.join(wanted) or 'no conditioning'}"
            )
        if value is None and name in wanted:
            raise InputError(f"the model {model.name!r} needs {name} for each of the {count} samples")
        if value is not None and value.shape != (count, *wanted[name]):
            raise InputError(f"{name} has the shape {list(value.shape)}; {count} samples need {[count, *wanted[name]]}")
    rows: dict[str, NDArray[Any]] = {}
    if given.class_labels is not None:
        null = given.null_label if given.null_label is not None else model.null_label
        labels = _labels(given.class_labels, model, null)
        if twin and null is None:
            raise InputError(
                f"the model {model.name!r} has no label for 'no class', so it cannot be guided; set guidance to 1"
            )
        rows["class_labels"] = _with_twin(labels, np.int64(null or 0)) if twin else labels
    if given.encoder_hidden_states is not None:
        states = np.ascontiguousarray(given.encoder_hidden_states, np.float32)
        null_states = given.null_hidden_states
        if twin and (null_states is None or null_states.shape != states.shape[1:]):
            shape = None if null_states is None else list(null_states.shape)
            raise InputError(
                "guidance needs null_hidden_states (the text states of the empty prompt) of shape "
                f"{list(states.shape[1:])}; given: {shape}"
            )
        rows["encoder_hidden_states"] = states if null_states is None or not twin else _with_twin(states, null_states)
    return rows


def _labels(labels: NDArray[np.integer[Any]], model: ModelSpec, null: int | None) -> NDArray[np.int64]:
    if labels.dtype.kind not in "iu":
        raise InputError(f"class_labels are {labels.dtype}; give integers")
    classes = model.num_classes or 0
    for label in labels.tolist():
        if not 0 <= label < classes and label != null:
            also = "" if null is None else f", or {null} for no class"
            raise InputError(
                f"the class label {label} is unknown to the model {model.name!r}; it knows 0 .. {classes - 1}{also}"
            )
    return np.ascontiguousarray(labels, np.int64)


def _with_twin(own: NDArray[Any], null: Any) -> NDArray[Any]:
    rows = np.empty((2 * len(own), *own.shape[1:]), own.dtype)
    rows[0::2] = own
    rows[1::2] = null
    return rows
