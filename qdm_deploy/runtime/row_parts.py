"""A batch in parts that can run beside each other: contiguous rows, all as many, that no row links across."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.runtime.session import ROW_INPUTS

__all__ = ["part_of", "row_parts"]


def row_parts(inputs: Mapping[str, NDArray[Any]], rows: int, most: int) -> list[slice]:
    """As many equal parts as possible, at most ``most``; one, the whole, where the rows cannot be parted.

    Args:
        inputs: of a step, checked.
        rows: their number.
        most: parts that can run at once.
    """
    for count in range(min(most, rows), 1, -1):
        if rows % count == 0 and _inside(inputs, rows // count):
            return [slice(first, first + rows // count) for first in range(0, rows, rows // count)]
    return [slice(0, rows)]


def part_of(inputs: Mapping[str, NDArray[Any]], part: slice) -> dict[str, NDArray[Any]]:
    """The inputs of some rows, which then count from 0."""
    return {name: value[part] - part.start if name in ROW_INPUTS else value[part] for name, value in inputs.items()}


def _inside(inputs: Mapping[str, NDArray[Any]], each: int) -> bool:
    """Whether every row finds those that it is linked to in its own part of ``each`` rows."""
    links = [inputs[name] for name in ROW_INPUTS if name in inputs]
    return all(bool((link // each == np.arange(len(link)) // each).all()) for link in links)
