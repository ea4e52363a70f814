"""The report as one HTML file: no script runs, nothing is fetched, and every text that comes from outside is escaped.

``report.html`` beside this module holds the page's frame and its style sheet; the sections are made here.
"""

from collections.abc import Sequence
from html import escape
from importlib.resources import files
from string import Template

from qdm_deploy.report.charts import Bar, Line, bar_chart, line_chart
from qdm_deploy.report.markup import (
    MARKS,
    Html,
    decibels,
    figure,
    image,
    megabytes,
    milliseconds,
    pairs,
    plain,
    precision_name,
    script_safe,
    section,
    span_of,
    table,
    words,
)
from qdm_deploy.report.model import EngineRow, LayerRow, QualityRow, Report
from qdm_deploy.report.pictures import ReportPictures

__all__ = ["render"]

_SERIES = 3


def render(report: Report, pictures: ReportPictures | None = None) -> str:
    """The page for a report.

    Args:
        report: what was measured.
        pictures: samples to show; None or empty leaves that section out.

    Returns:
        A complete HTML document; the verdict comes first, and the report's JSON is embedded in it, in
        ``<script type="application/json" id="report">``.
    """
    pictures = pictures or ReportPictures()
    sections = (
        _verdict(report),
        _cards(report),
        _pictures(pictures),
        _quality(report.quality, report.verdict.thresholds.min_eps_sqnr_db),
        _speed_and_size(report),
        _engines(report.engines),
        _checks(report),
        _layers(report),
        _origin(report),
    )
    page = Template(files("qdm_deploy.report").joinpath("report.html").read_text(encoding="utf-8"))
    return page.substitute(
        title=escape(f"{report.verdict.headline}: {_model_name(report)}"),
        body="\n".join(part for part in sections if part),
        json=script_safe(report.to_json()),
        version=escape(report.versions.get("qdm-deploy", "unknown")),
        schema=escape(report.schema_version),
    )


def _verdict(report: Report) -> str:
    verdict = report.verdict
    reasons = [(False, text) for text in verdict.problems] + [(True, text) for text in verdict.merits]
    listed = "".join(f"<li>{MARKS[good]}<span>{escape(text)}</span></li>" for good, text in reasons)
    created = f"{report.created:%Y-%m-%d %H:%M %Z}"
    return (
        f'<section id="verdict" class="{"ship" if verdict.ship else "stop"}">'
        f'<p class="eyebrow">INT8 build of <b>{escape(_model_name(report))}</b> · {escape(created)}</p>'
        f"<h1>{verdict.headline}</h1>"
        f'<ul class="reasons">{listed}</ul></section>'
    )


def _cards(report: Report) -> str:
    cards = []
    if report.speedup is not None:
        cards.append(_card("Speed", f"{report.speedup:.2f}×", "as fast as float, per denoising step"))
    sizes = report.size.int8_bytes
    if sizes:
        largest = max(sizes.values())
        change = f"{megabytes(report.size.float_bytes)} → {megabytes(largest)}" + (
            ", the largest target" if len(sizes) > 1 else ""
        )
        cards.append(_card("Size", f"{report.size.float_bytes / largest:.2f}×", f"smaller: {change}"))
    images = [row for row in report.quality if row.psnr_mean_db is not None]
    if images:
        worst = min(images, key=lambda row: row.psnr_mean_db or 0.0)
        cards.append(_card("Images", f"{worst.psnr_mean_db:.1f} dB", f"mean PSNR to float, {worst.label}"))
    if report.quality:
        lowest = min(report.quality, key=lambda row: row.eps_sqnr_mean_db)
        cards.append(_card("Model output", f"{lowest.eps_sqnr_mean_db:.1f} dB", f"mean SQNR, {lowest.label}"))
    if report.layers:
        quantized = sum(layer.precision == "int8" for layer in report.layers)
        cards.append(_card("Layers in INT8", f"{quantized}", f"of {len(report.layers)} with weights"))
    return f'<div class="cards">{"".join(cards)}</div>'


def _card(name: str, value: str, about: str) -> str:
    return f'<div class="card"><h2>{escape(name)}</h2><p class="big">{escape(value)}</p><p>{escape(about)}</p></div>'


def _pictures(pictures: ReportPictures) -> str:
    if not pictures.triplets and pictures.sheet is None:
        return ""
    name = f"INT8 ({pictures.quantized_name})" if pictures.quantized_name else "INT8"
    shown = "".join(
        f'<figure class="triplet"><div>{image(item.reference, "FP32")}{image(item.quantized, "INT8")}'
        f"{image(item.difference, 'difference')}</div><figcaption>{escape(item.caption)}</figcaption></figure>"
        for item in pictures.triplets
    )
    lead = (
        f"<p>From left to right: FP32, {escape(name)}, and |FP32 − INT8| × {pictures.amplification}, black where they "
        f"agree. Same seeds and noise.</p>"
        if pictures.triplets
        else ""
    )
    sheet = (
        f'<figure class="sheet"><figcaption>Samples, {escape(name)}</figcaption>{image(pictures.sheet, name)}</figure>'
        if pictures.sheet is not None
        else ""
    )
    return section("Images", f'{lead}<div class="triplets">{shown}</div>{sheet}')


def _quality(rows: Sequence[QualityRow], minimum: float) -> str:
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


def _speed_and_size(report: Report) -> str:
    sizes = [Bar("float", report.size.float_bytes / 1e6, megabytes(report.size.float_bytes), emphasized=False)]
    sizes += [Bar(f"{name} · INT8", size / 1e6, megabytes(size)) for name, size in report.size.int8_bytes.items()]
    charts = [
        figure("Size on disk", "Graph and weights.", bar_chart(sizes, title="Size", x_label="megabytes (10⁶ bytes)"))
    ]
    times_table = ""
    if report.speed:
        times = [
            Bar(
                f"{row.backend} · {precision_name(row.precision)} · batch {row.batch}",
                row.median_ms / row.batch,
                milliseconds(row.median_ms / row.batch),
                emphasized=row.precision == "int8",
                whisker=row.p95_ms / row.batch,
            )
            for row in report.speed
        ]
        chart = bar_chart(times, title="Time per step", x_label="milliseconds per sample and step")
        about = "Median; the thin line reaches to the 95th percentile. Shorter is better."
        charts.insert(0, figure("Time of one step", about, chart))
        times_table = table(
            (
                "backend",
                "precision",
                "batch",
                "median per step",
                "95th percentile",
                "timed steps",
                "samples × steps per second",
            ),
            [
                (
                    row.backend,
                    precision_name(row.precision),
                    str(row.batch),
                    milliseconds(row.median_ms),
                    milliseconds(row.p95_ms),
                    str(row.runs),
                    f"{row.samples_per_second:.1f}",
                )
                for row in report.speed
            ],
        )
    return section("Speed and size", f'<div class="charts">{"".join(charts)}</div>{times_table}')


def _engines(rows: Sequence[EngineRow]) -> str:
    if not rows:
        return ""
    audit = table(
        ("engine", "GPU architecture", "planned in INT8", "are INT8", "audit", "build time"),
        [
            (
                row.backend,
                f"SM {row.sm}",
                str(row.planned),
                str(row.int8),
                Html(f"{MARKS[row.clean]} {'clean' if row.clean else 'not clean'}"),
                f"{row.build_seconds:.1f} s",
            )
            for row in rows
        ],
    )
    kinds = list(dict.fromkeys(kind for row in rows for kind in row.kernels))
    kernels = table(
        ("kernels", *(f"{row.backend} SM {row.sm}" for row in rows)),
        [(kind.replace("_", " "), *(str(row.kernels.get(kind, 0)) for row in rows)) for kind in kinds],
        style="kernels",
    )
    failures = "".join(f"<li>{escape(failure)}</li>" for row in rows for failure in row.failures)
    failed = f'<h3>Planned layers that are not INT8</h3><ul class="failures">{failures}</ul>' if failures else ""
    lead = "<p>Read back from the compiled engines: what their kernels compute, not what the graph asked for.</p>"
    return section("Engine audit", f"{lead}{audit}{failed}<h3>Compiled kernels</h3>{kernels}")


def _checks(report: Report) -> str:
    if not report.checks:
        return ""
    rows = [(Html(MARKS[check.ok]), check.name, check.detail) for check in report.checks]
    return section("Checks", table(("", "check", "finding"), rows, style="checks"))


def _layers(report: Report) -> str:
    if not report.layers:
        return ""
    floats = [layer for layer in report.layers if layer.precision == "float"]
    reasons = [(layer.name, layer.reason) for layer in floats]
    kept = table(("stays in floating point", "why"), reasons, style="kept") if floats else ""
    head = ("layer", "precision", "scale s", "offset z", "branch factors k", "step gains r", "weight SQNR", "why")
    all_layers = table(head, [_layer(layer) for layer in report.layers], style="layers")
    summary = " · ".join(f"{words(name)}: {plain(value)}" for name, value in report.plan_summary.items())
    every = f'<details class="long"><summary>All {len(report.layers)} layers</summary>{all_layers}</details>'
    return section("Layers", f"<p>{escape(summary)}</p>{kept}{every}")


def _layer(layer: LayerRow) -> tuple[str, ...]:
    return (
        layer.name,
        precision_name(layer.precision),
        "–" if layer.scale is None else f"{layer.scale:.4g}",
        str(layer.zero_offset),
        span_of(layer.branch_factors),
        span_of(layer.step_gains),
        decibels(layer.weight_sqnr_db),
        layer.reason or " ".join(f"{name}: {note}" for name, note in layer.notes.items()),
    )


def _origin(report: Report) -> str:
    made = "Made by a call from Python." if report.command is None else "Made by this command:"
    command = "" if report.command is None else f"<pre><code>{escape(report.command)}</code></pre>"
    blocks = (
        ("Options and seeds", report.recipe.items()),
        ("Machine", report.machine.items()),
        ("Versions", report.versions.items()),
        ("Model", report.model.items()),
    )
    lists = "".join(f"<div><h3>{escape(name)}</h3>{pairs(items)}</div>" for name, items in blocks if items)
    stages = ""
    if report.stage_seconds:
        bars = [Bar(words(name), seconds, f"{seconds:.1f} s") for name, seconds in report.stage_seconds.items()]
        total = f"{sum(report.stage_seconds.values()):.0f} s in all."
        stages = figure("Time of the build", total, bar_chart(bars, title="Time of the build", x_label="seconds"))
    return section("How it was made", f'<p>{made}</p>{command}<div class="charts">{stages}{lists}</div>')


def _model_name(report: Report) -> str:
    return str(report.model.get("name", "model"))
