"""An evaluation as one HTML file, in the frame of a build's report: the verdict first, the numbers behind it below."""

from collections.abc import Callable, Sequence
from html import escape
from importlib.metadata import version
from importlib.resources import files
from string import Template

from qdm_deploy.report.charts import Line, line_chart
from qdm_deploy.report.evaluation import DistributionRow, Evaluation, Side, StepRow
from qdm_deploy.report.markup import decibels, figure, pairs, precision_name, script_safe, section, table

__all__ = ["render_evaluation"]

_INTERVAL = "95 % interval"


def render_evaluation(found: Evaluation) -> str:
    """The page for an evaluation.

    Returns:
        A complete HTML document that fetches nothing and runs no script; the evaluation's JSON is embedded in it, in
        ``<script type="application/json" id="report">``.
    """
    parts = (_verdict(found), _beside_real(found), _paired(found), _steps(found.per_step), _origin(found))
    page = Template(files("qdm_deploy.report").joinpath("report.html").read_text(encoding="utf-8"))
    return page.substitute(
        title=escape(f"Evaluation: {found.b.bundle}"),
        body="\n".join(part for part in parts if part),
        json=script_safe(found.model_dump_json()),
        version=escape(version("qdm-deploy")),
        schema=escape(f"evaluation {found.schema_version}"),
    )


def _verdict(found: Evaluation) -> str:
    headline, good = _headline(found)
    lines = "".join(f"<li><span>{escape(text)}</span></li>" for text in (found.verdict, *found.notes))
    return (
        f'<section id="verdict" class="{"ship" if good else "stop"}">'
        f'<p class="eyebrow">B: <b>{escape(_name(found, "b"))}</b> · A: {escape(_name(found, "a"))}</p>'
        f'<h1>{headline}</h1><ul class="reasons">{lines}</ul></section>'
    )


def _headline(found: Evaluation) -> tuple[str, bool]:
    frechet = next((row for row in found.distribution if row.low is not None), None)
    if frechet is None or frechet.low is None or frechet.high is None:
        return "Compared seed by seed", True
    if frechet.low <= 0 <= frechet.high:
        return "No difference found", True
    return ("B is closer", True) if frechet.high < 0 else ("A is closer", False)


def _name(found: Evaluation, side: str) -> str:
    card = found.a if side == "a" else found.b
    return f"{card.bundle}, {precision_name(card.precision)} on {card.backend.get('backend', 'unknown')}"


def _beside_real(found: Evaluation) -> str:
    if not found.distribution:
        return ""
    rows = [
        (row.metric, _number(row.a), _number(row.b), f"{row.difference:+.4g}", _interval(row), _number(row.floor))
        for row in found.distribution
    ]
    lead = (
        f"{found.images} images of each model, made from the same seeds, beside real images. The interval is of B - A, "
        "over the seeds, drawn for A and B together. Real beside real is what other real images score: a difference "
        "far below it means little."
    )
    reasons = "".join(
        f"<li>{escape(row.metric)}: {escape(row.why_no_interval)}.</li>"
        for row in found.distribution
        if row.why_no_interval is not None
    )
    why = f'<h3>No interval</h3><ul class="failures">{reasons}</ul>' if reasons else ""
    numbers = table(("metric", "A", "B", "B - A", _INTERVAL, "real beside real"), rows)
    return section("Beside real images", f"<p>{escape(lead)}</p>{numbers}{why}")


def _interval(row: DistributionRow) -> str:
    return "–" if row.low is None or row.high is None else f"{row.low:+.4g} to {row.high:+.4g}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _paired(found: Evaluation) -> str:
    rows = [
        (row.metric, str(row.seeds), _number(row.mean), f"{row.low:.4g} to {row.high:.4g}", _number(row.worst))
        for row in found.paired
    ]
    lead = "The same seeds through both models, image by image: how far B is from A, not which is better."
    return section("B beside A", f"<p>{lead}</p>{table(('metric', 'seeds', 'mean', _INTERVAL, 'worst seed'), rows)}")


def _steps(rows: Sequence[StepRow]) -> str:
    charts = "".join((
        _chart(
            rows,
            "Error of the model's output at each step",
            "A and B are given A's sample, so errors do not add up.",
            lambda row: (row.output, row.output_low, row.output_high),
        ),
        _chart(
            rows,
            "Error of the sample after each step",
            "Each runs on with its own sample, so this is what reaches the image.",
            lambda row: (row.sample, row.sample_low, row.sample_high),
        ),
    ))  # fmt: skip
    values = table(
        ("timestep", "model output SQNR", _INTERVAL, "sample SQNR", _INTERVAL),
        [
            (
                str(row.timestep),
                decibels(row.output),
                f"{row.output_low:.1f} to {row.output_high:.1f}",
                decibels(row.sample),
                f"{row.sample_low:.1f} to {row.sample_high:.1f}",
            )
            for row in rows
        ],
    )
    details = f'<details class="long"><summary>Every step in numbers</summary>{values}</details>'
    return section("Step by step", f'<div class="charts">{charts}</div>{details}')


def _chart(rows: Sequence[StepRow], title: str, about: str, of: Callable[[StepRow], tuple[float, float, float]]) -> str:
    names = ("SQNR", "lower end", "upper end")
    lines = [
        Line(name, tuple((row.timestep, of(row)[index]) for row in rows), 0 if index == 0 else 2)
        for index, name in enumerate(names)
    ]
    swatch = '<svg class="swatch" viewBox="0 0 30 8"><line class="curve series-{}" x1="1" x2="29" y1="4" y2="4"/></svg>'
    legend = f"<li>{swatch.format(0)}SQNR of all seeds together</li><li>{swatch.format(2)}its {_INTERVAL}</li>"
    return figure(
        title, about, line_chart(lines, title=title, y_label="SQNR in dB"), f'<ul class="legend">{legend}</ul>'
    )


def _origin(found: Evaluation) -> str:
    run = (
        ("sampler", found.sampler),
        ("steps", found.steps),
        ("first seed", found.seed),
        ("guidance", found.guidance),
        ("seeds step by step", found.paired_seeds),
        ("images beside real ones", found.images),
        ("classifier", found.classifier),
        ("its accuracy on real images", found.classifier_accuracy),
    )
    sides = "".join(f"<div><h3>{name}</h3>{_side(side)}</div>" for name, side in (("A", found.a), ("B", found.b)))
    return section("How it was made", f'<div class="charts"><div><h3>Run</h3>{pairs(run)}</div>{sides}</div>')


def _side(side: Side) -> str:
    backend = ((name, str(value)) for name, value in side.backend.items())
    return pairs((("bundle", side.bundle), ("bundle id", side.bundle_id), ("precision", side.precision), *backend))
