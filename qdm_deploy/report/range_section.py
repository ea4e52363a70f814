"""The sections on what calibration saw: inputs over the timesteps, and the branches of skip concatenations."""

from collections.abc import Sequence
from html import escape

from qdm_deploy.report.box_charts import box_chart, branch_chart
from qdm_deploy.report.markup import section, span_of, table
from qdm_deploy.report.ranges import BranchRange, InputRanges

__all__ = ["branch_section", "range_section"]

_OPEN_INPUTS, _OPEN_CONCATS = 12, 6


def range_section(inputs: Sequence[InputRanges]) -> str:
    """Box plots of every input, those whose range moves most in the open; empty without inputs."""
    if not inputs:
        return ""
    ordered = sorted(inputs, key=lambda item: -item.movement)
    charts = [_small(_readers(item), f"range moves {item.movement:.2f}-fold", _boxes(item)) for item in ordered]
    lead = (
        "<p>Each layer's input over the timesteps of the calibration, noise on the left and image on the right. Box: "
        "the middle half of all values; whiskers: 0.1 to 99.9 %; dots: smallest and largest value; dashed lines: what "
        "INT8 codes reach, step gains included (none: the input stays in float, or its channels have factors of their "
        "own). The inputs whose range moves most come first.</p>"
    )
    return section("Activation ranges over the timesteps", lead + _opened(charts, _OPEN_INPUTS, "inputs"))


def branch_section(inputs: Sequence[InputRanges]) -> str:
    """The branches of every concatenation that a layer reads; empty where there is none."""
    readers = [item for item in inputs if item.branches]
    if not readers:
        return ""
    ordered = sorted(readers, key=lambda item: -_apart(item.branches))
    charts = [
        _small(
            _readers(item),
            f"ranges differ {_apart(item.branches):.2f}-fold",
            branch_chart(item.branches, _names(item.branches), title=f"Branches of the input of {item.layers[0]}"),
        )
        for item in ordered
    ]
    lead = (
        "<p>Each branch of a skip concatenation as the layer behind it sees it, over all timesteps. A factor k "
        "stretches a narrow branch to the grid of the wide one; dashed lines: what INT8 codes reach with it. k = 1 "
        "for all: the branches share one scale.</p>"
    )
    rows = [
        (
            item.layers[0],
            str(index),
            str(branch.channels),
            span_of((branch.box.quantiles[0], branch.box.quantiles[-1])),
            span_of((branch.box.quantiles[1], branch.box.quantiles[-2])),
            _factor(branch),
            span_of(branch.grid),
        )
        for item in readers
        for index, branch in enumerate(item.branches)
    ]
    head = ("read by", "branch", "channels", "smallest to largest", "0.1 to 99.9 %", "k", "INT8 reaches")
    numbers = f'<details class="long"><summary>Every branch in numbers</summary>{table(head, rows)}</details>'
    return section("Ranges at the skip concatenations", lead + _opened(charts, _OPEN_CONCATS, "readers") + numbers)


def _opened(charts: Sequence[str], count: int, what: str) -> str:
    shown = f'<div class="smalls">{"".join(charts[:count])}</div>'
    if len(charts) <= count:
        return shown
    rest = f'<div class="smalls">{"".join(charts[count:])}</div>'
    return f'{shown}<details class="long"><summary>The other {len(charts) - count} {what}</summary>{rest}</details>'


def _small(title: str, about: str, chart: str) -> str:
    return f'<figure class="small"><h3>{escape(title)}</h3><p>{escape(about)}</p>{chart}</figure>'


def _boxes(item: InputRanges) -> str:
    return box_chart(item.boxes, item.grid, title=f"Input of {item.layers[0]} over the timesteps")


def _readers(item: InputRanges) -> str:
    more = len(item.layers) - 1
    return item.layers[0] + (f" and {more} more" if more else "")


def _apart(branches: Sequence[BranchRange]) -> float:
    """Largest over smallest range of the branches."""
    ranges = [max(abs(branch.box.quantiles[1]), abs(branch.box.quantiles[-2])) for branch in branches]
    return max(ranges) / max(min(ranges), 2.0**-40)


def _names(branches: Sequence[BranchRange]) -> list[str]:
    return [
        f"branch {index}, {branch.channels} channels, k = {_factor(branch)}" for index, branch in enumerate(branches)
    ]


def _factor(branch: BranchRange) -> str:
    low, high = branch.factor
    return f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
