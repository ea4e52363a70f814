"""What calibration saw at the input of each layer, over the timesteps and per skip branch, in a few numbers.

Q-Diffusion (Li et al. 2023) and PTQ4DM (Shang et al. 2023) draw these as box plots: a range
that moves with the timestep, or differs between the branches of a concatenation, is what one scale cannot serve.
"""

from collections.abc import Iterable
from functools import reduce
from itertools import pairwise
from operator import add
from typing import Annotated, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from qdm_deploy.artifacts.plan import LayerPlan, QuantizationPlan
from qdm_deploy.artifacts.statistics import ActivationStatistics, Histogram, TensorStatistics
from qdm_deploy.report.value import Count, Number, Positive, Value

__all__ = ["LEVELS", "Box", "BranchRange", "GridSpan", "InputRanges", "input_ranges"]

# The shares that the whiskers and the box of a plot stand for; the ends of the range come on top of them.
LEVELS = (0.001, 0.25, 0.5, 0.75, 0.999)
_MOST_BOXES = 10
_DIGITS = 5


class Box(Value):
    """Distribution of an activation over some timesteps.

    Attributes:
        first, last: the timesteps, both included.
        quantiles: smallest value, those at ``LEVELS``, largest value. The ends are exact, the others from a histogram.
    """

    first: Count
    last: Count
    quantiles: tuple[Number, Number, Number, Number, Number, Number, Number]

    @model_validator(mode="after")
    def _rising(self) -> Self:
        if self.first > self.last or any(low > high for low, high in pairwise(self.quantiles)):
            raise ValueError(f"timesteps {self.first} to {self.last} and quantiles {self.quantiles} do not rise")
        return self


class GridSpan(Value):
    """The values that INT8 codes reach over some timesteps: ``low`` to ``high``, timesteps ``first`` to ``last``."""

    first: Count
    last: Count
    low: Number
    high: Number


class BranchRange(Value):
    """One branch of a skip concatenation at a layer that reads it, over all timesteps.

    Attributes:
        channels: how many it has.
        box: what was seen.
        factor: smallest and largest k of its channels; they differ where channels have factors of their own.
        grid: smallest and largest value that INT8 codes reach, with ``factor`` and at the widest step gain; None where
            no INT8 layer reads it or its channels have factors of their own.
    """

    channels: Annotated[int, Field(gt=0)]
    box: Box
    factor: tuple[Positive, Positive]
    grid: tuple[Number, Number] | None


class InputRanges(Value):
    """The input that one or several layers share.

    Attributes:
        layers: who reads it, in execution order.
        boxes: distribution per timestep bin, from timestep 0 on.
        grid: what INT8 codes reach, per timestep bin with a gain of its own; empty where no INT8 layer reads the input
            or its channels have factors.
        branches: of a skip concatenation, in order; empty where it is none.
    """

    layers: Annotated[tuple[str, ...], Field(min_length=1)]
    boxes: Annotated[tuple[Box, ...], Field(min_length=1)]
    grid: tuple[GridSpan, ...] = ()
    branches: tuple[BranchRange, ...] = ()

    @property
    def movement(self) -> float:
        """Largest over smallest range of the boxes, a range being the larger size of the 0.1 and 99.9 % quantiles."""
        ranges = [max(abs(box.quantiles[1]), abs(box.quantiles[-2])) for box in self.boxes]
        return max(ranges) / max(min(ranges), 2.0**-40)


def input_ranges(statistics: ActivationStatistics, plan: QuantizationPlan) -> tuple[InputRanges, ...]:
    """Ranges of every shared input that was measured, in execution order.

    Args:
        statistics: of the inputs as they are, before any factor.
        plan: the decisions made on them.
    """
    found = []
    for name, layers in plan.topology.groups().items():
        tensor = statistics.inputs[name]
        readers = [plan.layer(layer.name) for layer in layers]
        int8 = next((reader for reader in readers if reader.precision == "int8"), None)
        found.append(
            InputRanges(
                layers=tuple(layer.name for layer in layers),
                boxes=tuple(_boxes(tensor, statistics.timestep_edges)),
                grid=_grid(int8, plan.timestep_edges),
                branches=tuple(_branches(tensor, layers[0].branches, int8, int(statistics.timestep_edges[-1]))),
            )
        )
    return tuple(found)


def _boxes(tensor: TensorStatistics, edges: NDArray[np.int64]) -> Iterable[Box]:
    """At most ``_MOST_BOXES``, of neighbouring timestep bins together."""
    bins = len(edges) - 1
    every = slice(None)
    for part in np.array_split(np.arange(bins), min(bins, _MOST_BOXES)):
        parts = [tensor.histogram(int(m), branch) for m in part for branch in range(tensor.branches)]
        yield _box(reduce(add, parts), tensor, part, every, int(edges[part[0]]), int(edges[part[-1] + 1]) - 1)


def _branches(
    tensor: TensorStatistics, widths: tuple[int, ...], reader: LayerPlan | None, num_train_timesteps: int
) -> Iterable[BranchRange]:
    if len(widths) < 2 or tensor.branches != len(widths):
        return
    bins = np.arange(len(tensor.counts))
    stop = 0
    for branch, width in enumerate(widths):
        channels = slice(stop, stop := stop + width)
        seen = reduce(add, [tensor.histogram(int(m), branch) for m in bins])
        box = _box(seen, tensor, bins, channels, 0, num_train_timesteps - 1)
        factor, grid = (1.0, 1.0), None
        if reader is not None:
            if reader.inverse_k is not None:
                own = 1.0 / reader.inverse_k[channels].astype(np.float64)
                factor = _short(own.min()), _short(own.max())
            gain = 1.0 if reader.inverse_r is None else 1.0 / float(reader.inverse_r.min())
            if factor[0] == factor[1]:
                low, high = _reach(reader)
                grid = _short(low * factor[0] * gain), _short(high * factor[0] * gain)
        yield BranchRange(channels=width, box=box, factor=factor, grid=grid)


def _grid(reader: LayerPlan | None, edges: NDArray[np.int64]) -> tuple[GridSpan, ...]:
    """x = r k s (q + z) over the codes q, where k is 1."""
    if reader is None or reader.inverse_k is not None:
        return ()
    low, high = _reach(reader)
    if reader.inverse_r is None:
        return (GridSpan(first=0, last=int(edges[-1]) - 1, low=_short(low), high=_short(high)),)
    return tuple(
        GridSpan(first=int(first), last=int(stop) - 1, low=_short(low / inverse), high=_short(high / inverse))
        for (first, stop), inverse in zip(pairwise(edges.tolist()), reader.inverse_r.tolist(), strict=True)
    )


def _reach(reader: LayerPlan) -> tuple[float, float]:
    return reader.scale * (reader.zero_offset - 128), reader.scale * (reader.zero_offset + 127)


def _box(
    seen: Histogram, tensor: TensorStatistics, bins: NDArray[np.int64], channels: slice, first: int, last: int
) -> Box:
    low = float(tensor.channel_min[bins][:, channels].min())
    high = float(tensor.channel_max[bins][:, channels].max())
    # A bin is wider than the values in it: no quantile lies outside what was seen.
    inner = np.clip(seen.quantiles(LEVELS), low, high)
    return Box(first=first, last=last, quantiles=tuple(map(_short, (low, *inner.tolist(), high))))


def _short(value: float) -> float:
    """To as many digits as a reader of the report may need; it keeps the order of values."""
    return float(f"{value:.{_DIGITS}g}")
