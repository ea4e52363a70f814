"""The report as one HTML file: no script runs, nothing is fetched, and every text that comes from outside is escaped.

``report.html`` beside this module holds the page's frame and its style sheet; the sections are made here.
"""

from collections.abc import Sequence
from html import escape
from importlib.resources import files
from string import Template

from qdm_deploy.report.charts import Bar, bar_chart
from qdm_deploy.report.layer_section import layer_section
from qdm_deploy.report.markup import (
    MARKS,
    Html,
    figure,
    image,
    megabytes,
    milliseconds,
    pairs,
    precision_name,
    script_safe,
    section,
    table,
    words,
)
from qdm_deploy.report.model import EngineRow, Report, RewriteRow
from qdm_deploy.report.noise_section import noise_section
from qdm_deploy.report.pictures import ReportPictures
from qdm_deploy.report.quality_section import quality_section
from qdm_deploy.report.range_section import branch_section, range_section

__all__ = ["render"]


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
    minimum = report.verdict.thresholds.min_eps_sqnr_db
    sections = (
        _verdict(report),
        _cards(report),
        _pictures(pictures),
        quality_section(report.quality, minimum),
        range_section(report.inputs),
        branch_section(report.inputs),
        layer_section(report.layers, report.plan_summary),
        noise_section(report.noise, minimum),
        _speed_and_size(report),
        _rewrites(report.rewrites),
        _engines(report.engines),
        _checks(report),
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
    warned = "".join(f'<p class="warning"><b>Warning.</b> {escape(text)}</p>' for text in report.warnings)
    created = f"{report.created:%Y-%m-%d %H:%M %Z}"
    return (
        f'<section id="verdict" class="{"ship" if verdict.ship else "stop"}">'
        f'<p class="eyebrow">INT8 build of <b>{escape(_model_name(report))}</b> · {escape(created)}</p>'
        f"<h1>{verdict.headline}</h1>"
        f'<ul class="reasons">{listed}</ul>{warned}</section>'
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


def _speed_and_size(report: Report) -> str:
    sizes = [Bar("float", report.size.float_bytes / 1e6, megabytes(report.size.float_bytes), emphasized=False)]
    sizes += [Bar(f"{name} · INT8", size / 1e6, megabytes(size)) for name, size in report.size.int8_bytes.items()]
    charts = [
        figure("Size on disk", "Graph and weights.", bar_chart(sizes, title="Size", x_label="megabytes (10⁶ bytes)"))
    ]
    files = table(
        ("model file", "graph and weights in bytes", "of float"),
        [
            (name, f"{size:,}".replace(",", " "), f"{size / report.size.float_bytes:.1%}".replace("%", " %"))
            for name, size in (
                ("float", report.size.float_bytes),
                *((f"{name} · INT8", size) for name, size in report.size.int8_bytes.items()),
            )
        ],
    )
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
    return section("Speed and size", f'<div class="charts">{"".join(charts)}</div>{times_table}{files}')


def _rewrites(rows: Sequence[RewriteRow]) -> str:
    if not rows:
        return ""
    lines = [
        (
            Html(MARKS[not row.missed]),
            row.target,
            row.name,
            f"{row.done} of {row.expected}",
            "; ".join((*row.missed, *row.left)),
        )
        for row in rows
    ]
    lead = (
        "<p>What each target's graph has in place of the exported one, counted against what the float graph holds.</p>"
    )
    return section("Graphs", lead + table(("", "graph", "rewritten", "places", "passed by"), lines, style="checks"))


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


def _origin(report: Report) -> str:
    made = "Made by a call from Python." if report.command is None else "Made by this command:"
    command = "" if report.command is None else f"<pre><code>{escape(report.command)}</code></pre>"
    seeds = {
        f"seeds of the {name}": str(first) if first == last else f"{first} to {last}"
        for name, (first, last) in report.seeds.items()
    }
    blocks = (
        ("Seeds", seeds.items()),
        ("Machine", report.machine.items()),
        ("Versions", report.versions.items()),
        ("Model", report.model.items()),
    )
    lists = "".join(f"<div><h3>{escape(name)}</h3>{pairs(items)}</div>" for name, items in blocks if items)
    options = f"<h3>Options</h3>{pairs(report.recipe.items(), 'many')}" if report.recipe else ""
    stages = ""
    if report.stage_seconds:
        bars = [Bar(words(name), seconds, f"{seconds:.1f} s") for name, seconds in report.stage_seconds.items()]
        total = f"{sum(report.stage_seconds.values()):.0f} s in all."
        stages = figure("Time of the build", total, bar_chart(bars, title="Time of the build", x_label="seconds"))
    return section("How it was made", f'<p>{made}</p>{command}<div class="charts">{stages}{lists}</div>{options}')


def _model_name(report: Report) -> str:
    return str(report.model.get("name", "model"))
