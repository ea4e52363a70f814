"""Box plots as small inline SVG: one input over the timesteps, and the branches of one skip concatenation.

Box from the 25 to the 75 % quantile with the median in it, whiskers to 0.1 and 99.9 %, dots at the ends of the range. A
chart is 300 wide, and all marks of a kind are one path: a page holds dozens of them.
"""

from collections.abc import Callable, Sequence

from qdm_deploy.report.charts import label, opening, ticks
from qdm_deploy.report.ranges import Box, BranchRange, GridSpan

__all__ = ["box_chart", "branch_chart"]

_WIDTH, _HEIGHT = 300, 160
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 8, 8, 22
_BRANCH_ROW = 46
_WIDEST_BOX = 26.0

# From a quantile's (place along the boxes, value) to (x, y).
Place = Callable[[float, float], tuple[float, float]]


def box_chart(boxes: Sequence[Box], grid: Sequence[GridSpan], *, title: str) -> str:
    """Boxes side by side over the timesteps, noise on the left, and lines at the ends of what INT8 codes reach.

    Args:
        boxes: at least one, over rising timesteps.
        grid: what INT8 reaches, over rising timesteps; may be empty.
        title: what the chart is called for screen readers.
    """
    ends = [value for box in boxes for value in (box.quantiles[0], box.quantiles[-1])]
    ends += [value for span in grid for value in (span.low, span.high)]
    marks = ticks(min(ends), max(ends), 5)
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    total = boxes[-1].last + 1

    def across(timestep: float) -> float:
        return right - timestep / total * (right - _LEFT)

    def up(value: float) -> float:
        return bottom - (value - marks[0]) / (marks[-1] - marks[0]) * (bottom - _TOP)

    parts = [opening(_HEIGHT, title, _WIDTH, "chart small")]
    for value in marks:
        style = "zero" if value == 0 else "grid"
        parts.append(f'<line class="{style}" x1="{_LEFT}" x2="{right}" y1="{up(value):.1f}" y2="{up(value):.1f}"/>')
        parts.append(label(_LEFT - 5, up(value) + 4, f"{value:g}", "end"))
    for timestep in ticks(0, total, 4):
        if 0 <= timestep <= total:
            anchor = "end" if timestep == 0 else "start" if timestep == total else "middle"
            parts.append(label(across(timestep), bottom + 16, f"{timestep:g}", anchor))
    middles = [(box.first + box.last + 1) / 2 for box in boxes]
    widths = [min(_WIDEST_BOX, 0.62 * (box.last + 1 - box.first) / total * (right - _LEFT)) for box in boxes]
    parts += _marks(boxes, middles, widths, lambda place, value: (across(place), up(value)), upright=True)
    if grid:
        for side in ("low", "high"):
            path = "".join(
                f"{'L' if index else 'M'}{across(span.first):.1f} {up(getattr(span, side)):.1f}"
                f"H{across(span.last + 1):.1f}"
                for index, span in enumerate(grid)
            )
            parts.append(f'<path class="reach" d="{path}"/>')
    return "".join([*parts, "</svg>"])


def branch_chart(branches: Sequence[BranchRange], names: Sequence[str], *, title: str) -> str:
    """The branches of one concatenation below each other on one axis, each under its name.

    Args:
        branches: at least one.
        names: a line for each.
        title: what the chart is called for screen readers.
    """
    ends = [value for branch in branches for value in (branch.box.quantiles[0], branch.box.quantiles[-1])]
    ends += [value for branch in branches if branch.grid is not None for value in branch.grid]
    marks = ticks(min(ends), max(ends), 4)
    left, right, bottom = 6, _WIDTH - 10, _TOP + _BRANCH_ROW * len(branches)

    def across(value: float) -> float:
        return left + (value - marks[0]) / (marks[-1] - marks[0]) * (right - left)

    parts = [opening(bottom + 22, title, _WIDTH, "chart small")]
    for value in marks:
        style = "zero" if value == 0 else "grid"
        parts.append(f'<line class="{style}" x1="{across(value):.1f}" x2="{across(value):.1f}" y1="4" y2="{bottom}"/>')
        parts.append(label(across(value), bottom + 16, f"{value:g}", "middle"))
    levels = [_TOP + _BRANCH_ROW * index + 28.0 for index in range(len(branches))]
    for branch, name, level in zip(branches, names, levels, strict=True):
        parts.append(label(left, level - 17, name, "start", "name"))
        if branch.grid is not None:
            low, high = map(across, branch.grid)
            parts.append(f'<path class="reach" d="M{low:.1f} {level - 11}v22M{high:.1f} {level - 11}v22"/>')
    boxes = [branch.box for branch in branches]
    parts += _marks(boxes, levels, [14.0] * len(boxes), lambda place, value: (across(value), place), upright=False)
    return "".join([*parts, "</svg>"])


def _marks(
    boxes: Sequence[Box], places: Sequence[float], widths: Sequence[float], at: Place, *, upright: bool
) -> list[str]:
    """One path each for the whiskers, the boxes, the medians and the ends of the ranges."""
    along, over = ("V", "h") if upright else ("H", "v")
    whiskers, bodies, medians, ends = [], [], [], []
    for box, place, width in zip(boxes, places, widths, strict=True):
        spots = [at(place, value) for value in box.quantiles]
        lengths = [y if upright else x for x, y in spots]
        half = width / 2
        for outer, inner in ((1, 2), (5, 4)):
            x, y = spots[outer]
            cap = f"M{x - half / 2:.1f} {y:.1f}" if upright else f"M{x:.1f} {y - half / 2:.1f}"
            whiskers.append(f"M{x:.1f} {y:.1f}{along}{lengths[inner]:.1f}{cap}{over}{half:.1f}")
        x, y = spots[2]
        corner = f"M{x - half:.1f} {y:.1f}" if upright else f"M{x:.1f} {y - half:.1f}"
        bodies.append(f"{corner}{over}{width:.1f}{along}{lengths[4]:.1f}{over}{-width:.1f}Z")
        x, y = spots[3]
        start = f"M{x - half:.1f} {y:.1f}" if upright else f"M{x:.1f} {y - half:.1f}"
        medians.append(f"{start}{over}{width:.1f}")
        ends += [f"M{x:.1f} {y:.1f}h0" for x, y in (spots[0], spots[-1])]
    kinds = (("stem", whiskers), ("body", bodies), ("median", medians), ("end", ends))
    return [f'<path class="{kind}" d="{"".join(paths)}"/>' for kind, paths in kinds]
