"""A batch in parts that can run beside each other: contiguous rows, all as many, that no row links across."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.artifacts.step_interface import role_of_input

__all__ = ["SMALL", "part_of", "row_parts"]

# What a row costs beside one in a small part of several rows on one core: alone in its part, in a larger part, and for
# every doubling of the cores that work on its part, because they wait for each other at every layer and read what
# others wrote. U-Nets of 7 and 36 M parameters, both runtimes, 2 cores; on 16 cores a doubling cost 1.1 to 1.2.
SMALL = 4
_SINGLE, _LARGE, _WAITING = 1.08, 1.04, 1.12


def row_parts(inputs: Mapping[str, NDArray[Any]], rows: int, cores: int, small: int = SMALL) -> list[slice]:
    """The equal parts that end soonest; one, the whole on all cores together, where that is best.

    Where there are fewer parts than cores, each has an equal share of them.

    Parts are small, so that what a core passes from layer to layer stays in its cache, but not single rows, which
    leave the cores' vector units little to reuse of a weight.

    Args:
        inputs: of a step, checked.
        rows: their number.
        cores: how many work on them.
        small: rows of which a core's caches hold what they pass from layer to layer.
    """
    best, soonest = rows, rows * _per_row(cores)
    for each in range(rows // 2 if cores > 1 else 0, 0, -1):
        lanes = min(rows // each, cores)
        on_one = _SINGLE if each == 1 else _LARGE if each > small else 1
        end = -(-rows // each // lanes) * each * on_one * _per_row(cores // lanes)
        if rows % each == 0 and end < soonest and _inside(inputs, each):
            best, soonest = each, end
    return [slice(first, first + best) for first in range(0, rows, best)]


def _per_row(cores: int) -> float:
    """Time of a row that so many cores work on, where one core takes 1."""
    return math.pow(_WAITING, math.log2(cores)) / cores


def part_of(inputs: Mapping[str, NDArray[Any]], part: slice) -> dict[str, NDArray[Any]]:
    """The inputs of some rows, which then count from 0."""
    return {
        name: value[part] - part.start if role_of_input(name) == "link" else value[part]
        for name, value in inputs.items()
    }


def _inside(inputs: Mapping[str, NDArray[Any]], each: int) -> bool:
    """Whether every row finds those that it is linked to in its own part of ``each`` rows."""
    links = [values for name, values in inputs.items() if role_of_input(name) == "link"]
    return all(bool((link // each == np.arange(len(link)) // each).all()) for link in links)
