"""A batch in parts that can run beside each other: contiguous rows, all as many, that no row links across."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.runtime.session import ROW_INPUTS

__all__ = ["SMALL", "part_of", "row_parts"]

# What a row costs beside one in a small part of several rows: alone in its part, in a larger part, and where all lanes
# work on the whole batch and wait for each other at every layer. Two U-Nets of 7 and 36 M parameters, 2 cores, both
# runtimes.
SMALL = 4
_SINGLE, _LARGE, _WAITING = 1.08, 1.04, 1.12


def row_parts(inputs: Mapping[str, NDArray[Any]], rows: int, lanes: int, small: int = SMALL) -> list[slice]:
    """The equal parts that end soonest on so many lanes; one, the whole on all lanes together, where that is best.

    Parts are small, so that what a lane passes from layer to layer stays in its core's cache, but not single rows,
    which leave the cores' vector units little to reuse of a weight.

    Args:
        inputs: of a step, checked.
        rows: their number.
        lanes: parts that can run at once.
        small: rows of which a core's caches hold what they pass from layer to layer.
    """
    best, soonest = rows, _WAITING * rows / lanes
    for each in range(rows // 2 if lanes > 1 else 0, 0, -1):
        end = -(-rows // each // lanes) * each * (_SINGLE if each == 1 else _LARGE if each > small else 1)
        if rows % each == 0 and end < soonest and _inside(inputs, each):
            best, soonest = each, end
    return [slice(first, first + best) for first in range(0, rows, best)]


def part_of(inputs: Mapping[str, NDArray[Any]], part: slice) -> dict[str, NDArray[Any]]:
    """The inputs of some rows, which then count from 0."""
    return {name: value[part] - part.start if name in ROW_INPUTS else value[part] for name, value in inputs.items()}


def _inside(inputs: Mapping[str, NDArray[Any]], each: int) -> bool:
    """Whether every row finds those that it is linked to in its own part of ``each`` rows."""
    links = [inputs[name] for name in ROW_INPUTS if name in inputs]
    return all(bool((link // each == np.arange(len(link)) // each).all()) for link in links)
