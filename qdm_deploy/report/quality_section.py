"""The section on quality: INT8 beside float on the same seeds, step by step."""

from collections.abc import Sequence
from html import escape

from qdm_deploy.report.charts import Line, line_chart
from qdm_deploy.report.markup import decibels, figure, section, table
from qdm_deploy.report.model import QualityRow

__all__ = ["quality_section"]

_SERIES = 3


def quality_section(rows: Sequence[QualityRow], minimum: float) -> str:
    """Tables and error curves; empty where nothing was measured.

    Args:
        rows: one per target.
        minimum: SQNR of the model's output that the verdict asks for, in dB.
    """
    if not rows:
        return ""
    summary = table(
        (
            "target",
            "images PSNR, mean",
            "worst",
            "model output SQNR, mean",
            "worst step",
            "finished sample SQNR",
            "max |error|",
        ),
        [
            (
                row.label,
                decibels(row.psnr_mean_db),
                decibels(row.psnr_min_db),
                decibels(row.eps_sqnr_mean_db),
                f"{row.eps_sqnr_min_db:.1f} dB at {row.worst_timestep}",
                decibels(row.state_sqnr_final_db),
                f"{row.max_abs:.3g}",
            )
            for row in rows
        ],
    )
    runs = sorted({
        f"{row.samples} samples, {row.steps} steps of {row.sampler}, guidance {row.guidance:g}" for row in rows
    })  # fmt: skip
    charts = (
        figure(
            "Error of the model's output at each step",
            "INT8 and float are given the float run's sample, so errors do not add up.",
            line_chart(
                _lines(rows, "eps_sqnr_db"), title="SQNR of the model's output", y_label="SQNR in dB", threshold=minimum
            ),
            _legend(rows, minimum),
        ),
        figure(
            "Error of the sample after each step",
            "Each run continues with its own sample, so this is what reaches the image.",
            line_chart(_lines(rows, "state_sqnr_db"), title="SQNR of the sample", y_label="SQNR in dB"),
            _legend(rows, None),
        ),
    )
    values = table(
        ("target", "timestep", "model output SQNR", "sample SQNR"),
        [
            (row.label, str(timestep), decibels(eps), decibels(state))
            for row in rows
            for timestep, eps, state in zip(row.timesteps, row.eps_sqnr_db, row.state_sqnr_db, strict=True)
        ],
    )
    lead = f"<p>INT8 against float on the same seeds: {escape('; '.join(runs))}. Higher decibels are better.</p>"
    details = f'<details class="long"><summary>Every step in numbers</summary>{values}</details>'
    return section("Quality", f'{lead}{summary}<div class="charts">{"".join(charts)}</div>{details}')


def _lines(rows: Sequence[QualityRow], field: str) -> list[Line]:
    return [
        Line(row.label, tuple(zip(row.timesteps, getattr(row, field), strict=True)), index % _SERIES)
        for index, row in enumerate(rows)
    ]


def _legend(rows: Sequence[QualityRow], minimum: float | None) -> str:
    names = [(f"series-{index % _SERIES}", row.label) for index, row in enumerate(rows)]
    if minimum is not None:
        names.append(("threshold", f"required mean, {minimum:g} dB"))
    swatch = '<svg class="swatch" viewBox="0 0 30 8"><line class="curve {}" x1="1" x2="29" y1="4" y2="4"/></svg>'
    return '<ul class="legend">' + "".join(f"<li>{swatch.format(c)}{escape(n)}</li>" for c, n in names) + "</ul>"
