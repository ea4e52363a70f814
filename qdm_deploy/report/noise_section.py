"""The section on the noise of single layers: the frontier between quality and what runs in INT8, or takes time."""

from collections.abc import Sequence

from qdm_deploy.report.charts import PERCENT, frontier_chart, ticks
from qdm_deploy.report.markup import breakable, decibels, figure, percent, section, table
from qdm_deploy.report.sensitivity import FrontierRow, NoiseBlock

__all__ = ["noise_section"]

_OPEN_ROWS = 8
# With hardly a layer left in INT8 the curve rises without end, and would press the rest of it flat.
_LEAST_DRAWN = 0.1
_COST = "the INT8 layers' multiply-accumulates"


def noise_section(noise: NoiseBlock | None, minimum: float) -> str:
    """The frontier as a chart and as a table; empty where nothing was measured or nothing adds noise.

    Args:
        noise: what was measured.
        minimum: SQNR of the model's output that the verdict asks for, in dB.
    """
    if noise is None or not noise.frontier:
        return ""
    drawn_rows = [row for row in noise.frontier if row.int8_share >= _LEAST_DRAWN]
    chart = _chart(
        [(row.int8_share, row) for row in drawn_rows],
        "Predicted quality against the share in INT8",
        f"% of {_COST}",
        PERCENT,
        None if noise.sqnr_db is None else (noise.int8_share, noise.sqnr_db),
        minimum,
    )
    swatch = '<svg class="swatch" viewBox="0 0 30 8">{}</svg>'
    ring = swatch.format('<circle class="ring" cx="15" cy="4" r="3.4"/>')
    dashes = swatch.format('<line class="curve threshold" x1="1" x2="29" y1="4" y2="4"/>')
    legend = (
        f'<ul class="legend"><li>{ring}this bundle, predicted</li><li>{dashes}required mean, {minimum:g} dB</li></ul>'
    )
    about = "From all in INT8, at the right, one layer more per dot, to 10 %."
    drawn = figure("Keeping layers in float, the noisiest first", about, chart, legend)
    timed = [(row.step_ms, row) for row in drawn_rows if row.step_ms is not None]
    if timed and noise.step_ms is not None:
        costs = [cost for cost, _ in timed] + [noise.step_ms]
        by_time = _chart(
            timed,
            "Predicted quality against the time of a step",
            f"ms per step ({noise.timed_on})",
            [(value, f"{value:g}") for value in ticks(min(costs), max(costs))],
            None if noise.sqnr_db is None else (noise.step_ms, noise.sqnr_db),
            minimum,
        )
        about = "The same points. Each layer's convolution or product was timed in INT8 and in float."
        drawn += figure("What they cost in time", about, by_time, legend)
    head: tuple[str, ...] = ("one more in float", "left in INT8", "noise left", "predicted SQNR")
    if timed:
        head = (*head, "ms")
    rows = [_row(row) for row in noise.frontier]
    few = table(head, rows[: _OPEN_ROWS + 1], style="frontier")
    every = ""
    if len(rows) > _OPEN_ROWS + 1:
        all_rows = table(head, rows, style="frontier")
        every = f'<details class="long"><summary>All {len(rows)} points</summary>{all_rows}</details>'
    kept = f" {noise.kept} of them stay in float." if noise.kept else ""
    lead = (
        f"<p>Each INT8 layer was quantized alone, on {noise.rows} calibration rows of {noise.timesteps} timesteps, and "
        f"the noise compared that it adds to the model's output.{kept} Predictions add these powers up and are right "
        f"within a few dB; the measured quality stands above. The share in INT8 is that of {_COST}.</p>"
    )
    first = f"<div><h3>What the first layers would give</h3>{few}</div>"
    # Beside one chart there is room for the table; beside two, and with a column more, there is none.
    charts = f'<div class="charts">{drawn}</div>{first}' if timed else f'<div class="charts">{drawn}{first}</div>'
    return section("Noise and the frontier", f"{lead}{charts}{every}")


def _chart(
    points: Sequence[tuple[float, FrontierRow]],
    title: str,
    x_label: str,
    x_ticks: Sequence[tuple[float, str]],
    chosen: tuple[float, float] | None,
    minimum: float,
) -> str:
    return frontier_chart(
        [(cost, row.sqnr_db, f"{row.layer or 'all in INT8'}: {row.sqnr_db:.1f} dB") for cost, row in points],
        title=title,
        x_label=x_label,
        y_label="predicted SQNR in dB",
        x_ticks=x_ticks,
        chosen=chosen,
        threshold=minimum,
    )


def _row(row: FrontierRow) -> tuple[str, ...]:
    cells = (
        "none: all in INT8" if row.layer is None else breakable(row.layer),
        percent(row.int8_share),
        percent(row.noise_share),
        decibels(row.sqnr_db),
    )
    return cells if row.step_ms is None else (*cells, f"{row.step_ms:.1f}")
