"""What the images of a run should show, as a step graph reads it: arrays by input name, one row for each image.

An encoder makes it (``qdm_deploy.components.encoders``); nothing between the encoder and the graph knows what the
numbers mean. With them comes what "nothing in particular" is to the model: the row of the unconditional twin.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.artifacts.step_interface import StepInterface
from qdm_deploy.errors import InputError

__all__ = ["Conditioning", "check_conditioning", "row_links", "rows_of"]

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Conditioning:
    """The conditions of N images.

    Attributes:
        own: by input name, [N, ...], or [1, ...] where all images share it. Empty for an unconditional model.
        unconditional: the same of the images' unconditional twins; None where the model has none, or nobody gave one.
    """

    own: Arrays = field(default_factory=dict)
    unconditional: Arrays | None = None

    def take(self, images: slice | NDArray[np.int64]) -> "Conditioning":
        """The conditions of some of the images, in their order."""

        def some(values: Arrays) -> dict[str, NDArray[Any]]:
            return {name: value if len(value) == 1 else value[images] for name, value in values.items()}

        return Conditioning(some(self.own), None if self.unconditional is None else some(self.unconditional))

    def image(self, index: int) -> "Conditioning":
        """The conditions of one image, [1, ...] each."""
        return self.take(slice(index, index + 1))


def check_conditioning(interface: StepInterface, conditioning: Conditioning, count: int, *, guided: bool) -> None:
    """Refuse conditions that a step graph does not take.

    Raises:
        InputError: a name, dtype, shape or number of rows is wrong, a value is not finite, or guidance is wanted and
            there is no unconditional twin.
    """
    names = [spec.name for spec in interface.conditions]
    if guided and not names:
        raise InputError("the model is unconditional, so there is nothing to guide; leave guidance at 1")
    if guided and conditioning.unconditional is None:
        raise InputError(
            "guidance needs what the model sees where nothing is asked for, and there is none; give it, or set "
            "guidance to 1"
        )
    for values in (conditioning.own, conditioning.unconditional if guided else None):
        if values is None:
            continue
        if set(values) != set(names):
            raise InputError(
                f"the model is conditioned on {', '.join(names) or 'nothing'}; given: {', '.join(values) or 'nothing'}"
            )
        for spec in interface.conditions:
            value = values[spec.name]
            if value.dtype != spec.numpy_dtype or len(value) not in (1, count) or value.shape[1:] != spec.row_shape:
                raise InputError(
                    f"{spec.name} is {value.dtype} {list(value.shape)}; {count} images need {spec.dtype} "
                    f"{[count, *spec.row_shape]}, or one row for all of them"
                )
            if not np.isfinite(value).all():
                raise InputError(f"{spec.name} holds NaN or infinity")


def rows_of(conditioning: Conditioning, count: int, rows_each: int) -> dict[str, NDArray[Any]]:
    """The conditions of all rows of a batch: each image's own and, where it has two rows, its twin's behind it."""
    rows: dict[str, NDArray[Any]] = {}
    for name, own in conditioning.own.items():
        rows[name] = np.empty((count * rows_each, *own.shape[1:]), own.dtype)
        rows[name][::rows_each] = own
        if rows_each == 2:
            rows[name][1::2] = (conditioning.unconditional or {})[name]
    return rows


def row_links(rows: int, rows_each: int) -> dict[str, NDArray[np.int64]]:
    """Where each row finds its unconditional twin and its owner, counted from the start of the batch that holds it."""
    index = np.arange(rows)
    owner = index - index % rows_each
    return {"unconditional_row": owner + rows_each - 1, "owner_row": owner}
