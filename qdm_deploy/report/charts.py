"""Charts as inline SVG: lines over timesteps, horizontal bars, and the frontier of layers kept in float.

Colours come from the page's style sheet by class (``series-0``...), so that a chart follows the page into dark mode and
print. A view box is 480 wide, as wide as a column of the page, so that text keeps about its size on a phone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["PERCENT", "Bar", "Line", "bar_chart", "frontier_chart", "label", "line_chart", "opening", "ticks"]

WIDTH = 480
_LINE_HEIGHT = 290
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 14, 14, 50
_BAR_ROW = 42
_BAR_THICKNESS = 13
_VALUE_SPACE = 92
# Marks of an axis of shares.
PERCENT = tuple((percent / 100, f"{percent}") for percent in range(0, 101, 20))


@dataclass(frozen=True)
class Line:
    """One curve: (x, y) points in drawing order; ``series`` picks its colour and dashes, 0 to 2."""

    name: str
    points: tuple[tuple[float, float], ...]
    series: int


@dataclass(frozen=True)
class Bar:
    """One bar from 0; ``whisker`` is a second value that a thin line reaches to; ``shown`` is the value as text."""

    name: str
    value: float
    shown: str
    emphasized: bool = True
    whisker: float | None = None


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers (1, 2, 2.5 or 5 times a power of ten apart) whose ends enclose [low, high]."""
    if not high > low:
        low, high = low - 1.0, high + 1.0
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.floor(low / step)
    return [index * step for index in range(first, math.ceil(high / step) + 1)]


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    y_label: str,
    threshold: float | None = None,
) -> str:
    """Curves over timesteps, which run from the largest on the left, noise, down to the smallest, the image.

    Args:
        lines: at least one, each with at least one point.
        title: what the chart is called for screen readers.
        y_label: of the vertical axis, with its unit.
        threshold: a dashed horizontal line.
    """
    heights = [y for line in lines for _, y in line.points] + ([] if threshold is None else [threshold])
    places = [x for line in lines for x, _ in line.points]
    y_ticks = ticks(min(heights), max(heights))
    start, stop = max(places), min(places)
    right, bottom = WIDTH - _RIGHT, _LINE_HEIGHT - _BOTTOM

    def across(timestep: float) -> float:
        return (_LEFT + right) / 2 if start == stop else _LEFT + (start - timestep) / (start - stop) * (right - _LEFT)

    def up(value: float) -> float:
        return bottom - (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (bottom - _TOP)

    parts = [opening(_LINE_HEIGHT, title)]
    for value in y_ticks:
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{up(value):.1f}" y2="{up(value):.1f}"/>')
        parts.append(label(_LEFT - 7, up(value) + 4, f"{value:g}", "end"))
    for value in ticks(stop, start) if start > stop else [start]:
        if stop <= value <= start:
            parts.append(label(across(value), bottom + 18, f"{value:g}", "middle"))
    middle = (_TOP + bottom) / 2
    parts.append(f'<text class="axis" text-anchor="middle" transform="translate(13 {middle:.1f}) rotate(-90)">')
    parts.append(f"{escape(y_label)}</text>")
    parts.append(
        label(
            (_LEFT + right) / 2, _LINE_HEIGHT - 8, "timestep (noise on the left, image on the right)", "middle", "axis"
        )
    )
    if threshold is not None:
        parts.append(
            f'<line class="threshold" x1="{_LEFT}" x2="{right}" y1="{up(threshold):.1f}" y2="{up(threshold):.1f}"/>'
        )
    for line in lines:
        path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in line.points)
        parts.append(f'<polyline class="curve series-{line.series}" points="{path}"/>')
        parts += [
            f'<circle class="dot series-{line.series}" cx="{across(x):.1f}" cy="{up(y):.1f}" r="2.6">'
            f"<title>{escape(line.name)}, timestep {x:g}: {y:.2f} dB</title></circle>"
            for x, y in line.points
        ]
    return "".join([*parts, "</svg>"])


def frontier_chart(
    points: Sequence[tuple[float, float, str]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    x_ticks: Sequence[tuple[float, str]] = PERCENT,
    chosen: tuple[float, float] | None = None,
    threshold: float | None = None,
) -> str:
    """Quality against what it costs: the share that runs in INT8, or the time of a step; both grow to the right.

    Args:
        points: (cost, value, what the point is) in drawing order, at least one.
        title: what the chart is called for screen readers.
        x_label: of the horizontal axis, with its unit.
        y_label: of the vertical axis, with its unit.
        x_ticks: cost and label of every mark, the ends of the axis among them; shares in [0, 1] by default.
        chosen: a point to put a ring around.
        threshold: a dashed horizontal line.
    """
    extra = [value for value in (threshold, None if chosen is None else chosen[1]) if value is not None]
    y_ticks = ticks(min([y for _, y, _ in points] + extra), max([y for _, y, _ in points] + extra))
    right, bottom = WIDTH - _RIGHT - 8, _LINE_HEIGHT - _BOTTOM

    first, last = x_ticks[0][0], x_ticks[-1][0]

    def across(cost: float) -> float:
        return _LEFT + (cost - first) / (last - first) * (right - _LEFT)

    def up(value: float) -> float:
        return bottom - (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (bottom - _TOP)

    parts = [opening(_LINE_HEIGHT, title)]
    for value in y_ticks:
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{up(value):.1f}" y2="{up(value):.1f}"/>')
        parts.append(label(_LEFT - 7, up(value) + 4, f"{value:g}", "end"))
    parts += [label(across(cost), bottom + 18, text, "middle") for cost, text in x_ticks]
    middle = (_TOP + bottom) / 2
    parts.append(f'<text class="axis" text-anchor="middle" transform="translate(13 {middle:.1f}) rotate(-90)">')
    parts.append(f"{escape(y_label)}</text>")
    parts.append(label((_LEFT + right) / 2, _LINE_HEIGHT - 8, x_label, "middle", "axis"))
    if threshold is not None:
        level = f"{up(threshold):.1f}"
        parts.append(f'<line class="threshold" x1="{_LEFT}" x2="{right}" y1="{level}" y2="{level}"/>')
    path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y, _ in points)
    parts.append(f'<polyline class="curve series-0" points="{path}"/>')
    parts += [
        f'<circle class="dot series-0" cx="{across(x):.1f}" cy="{up(y):.1f}" r="2.6">'
        f"<title>{escape(name)}</title></circle>"
        for x, y, name in points
    ]
    if chosen is not None:
        parts.append(f'<circle class="ring" cx="{across(chosen[0]):.1f}" cy="{up(chosen[1]):.1f}" r="7"/>')
    return "".join([*parts, "</svg>"])


def bar_chart(bars: Sequence[Bar], *, title: str, x_label: str) -> str:
    """Bars below each other on a common axis from 0, each under its name and beside its value.

    Args:
        bars: at least one; values of 0 or more.
        title: what the chart is called for screen readers.
        x_label: of the horizontal axis, with its unit.
    """
    marks = ticks(0.0, max(max(bar.value, bar.whisker or 0.0) for bar in bars), 4)
    right, bottom = WIDTH - _VALUE_SPACE, _TOP + _BAR_ROW * len(bars)

    def across(value: float) -> float:
        return 1 + value / marks[-1] * (right - 1)

    parts = [opening(bottom + 44, title)]
    for value in marks:
        parts.append(f'<line class="grid" x1="{across(value):.1f}" x2="{across(value):.1f}" y1="4" y2="{bottom}"/>')
        anchor = "start" if value == 0 else "middle"
        parts.append(label(across(value), bottom + 17, f"{value:g}", anchor))
    for index, bar in enumerate(bars):
        top = _TOP + _BAR_ROW * index
        style = "bar emphasized" if bar.emphasized else "bar"
        parts.append(label(4, top + 8, bar.name, "start", "name"))
        parts.append(
            f'<rect class="{style}" x="1" y="{top + 15}" width="{across(bar.value) - 1:.1f}" '
            f'height="{_BAR_THICKNESS}" rx="2"/>'
        )
        if bar.whisker is not None:
            level = top + 15 + _BAR_THICKNESS / 2
            parts.append(
                f'<path class="whisker" d="M{across(bar.value):.1f} {level}H{across(bar.whisker):.1f}m0 -4v8"/>'
            )
        end = across(max(bar.value, bar.whisker or 0.0))
        parts.append(label(end + 7, top + 26, bar.shown, "start", "value"))
    parts.append(label(1, bottom + 38, x_label, "start", "axis"))
    return "".join([*parts, "</svg>"])


def opening(height: int, title: str, width: int = WIDTH, style: str = "chart") -> str:
    """The start of a chart, which ``</svg>`` ends."""
    return f'<svg class="{style}" viewBox="0 0 {width} {height}" role="img"><title>{escape(title)}</title>'


def label(x: float, y: float, text: str, anchor: str, style: str = "tick") -> str:
    """Text in a chart, its base line at y."""
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
