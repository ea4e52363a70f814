import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from qdm_deploy.report import (
    CheckRow,
    EngineRow,
    LayerRow,
    QualityRow,
    Report,
    ReportPictures,
    SizeBlock,
    SpeedRow,
    Triplet,
    render,
)
from qdm_deploy.report.sensitivity import NoiseBlock

VOID = {"meta", "img", "br", "wbr", "link", "input"}
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"' onload='alert(3)' $title <!-- &lt;"


class Page(HTMLParser):
    """Tags, attributes and texts of a page; fails where an element is closed that is not the innermost open one."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.scripts: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif self.open and self.open[-1] != "style":
            self.text.append(data)

    def headings(self, level: str) -> int:
        return sum(tag == level for tag, _ in self.tags)


def svgs(page: str) -> list[ET.Element]:
    return [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]  # noqa: S314


def test_page_is_well_formed(report: Callable[..., Report], pictures: ReportPictures) -> None:
    page = render(report(), pictures)
    parsed = Page(page)
    assert parsed.open == []
    assert parsed.headings("h1") == 1
    charts = [svg for svg in svgs(page) if svg.get("class") == "chart"]
    assert len(charts) == 6
    assert len([svg for svg in svgs(page) if svg.get("class") == "chart small"]) == 3
    for chart in charts:
        assert chart.findtext("title")
        assert [text.text for text in chart.iter("text") if text.get("class") == "axis"]


def test_verdict_comes_first(report: Callable[..., Report], pictures: ReportPictures) -> None:
    body = render(report(), pictures).partition("<body>")[2]
    assert body.split("<section", 2)[1].startswith(' id="verdict" class="ship"')
    text = [part.strip() for part in Page("<html><body>" + body).text if part.strip()]
    assert "SHIP" in text[:6]
    positions = [
        text.index(title)
        for title in (
            "Images",
            "Quality",
            "Activation ranges over the timesteps",
            "Ranges at the skip concatenations",
            "Layers",
            "Noise and the frontier",
            "Speed and size",
            "Engine audit",
            "Checks",
            "How it was made",
        )
    ]
    assert text.index("SHIP") < min(positions)
    assert positions == sorted(positions)


def test_problems_stand_above_merits(report: Callable[..., Report]) -> None:
    page = render(report(speedup=0.5))
    assert '<section id="verdict" class="stop">' in page
    assert "<h1>DO NOT SHIP</h1>" in page
    reasons = re.findall(r'<li><span class="mark (good|bad)">', page)
    assert reasons[0] == "bad"
    assert reasons.count("bad") == 1
    assert set(reasons[1:]) == {"good"}


def test_nothing_is_fetched_and_no_script_runs(report: Callable[..., Report], pictures: ReportPictures) -> None:
    page = render(report(), pictures)
    parsed = Page(page)
    assert re.findall(r"https?:|url\(|@import|//", re.sub(r'"data:[^"]*"', "", page)) == []
    assert {tag for tag, _ in parsed.tags} & {
        "link",
        "iframe",
        "object",
        "embed",
        "base",
        "form",
        "audio",
        "video",
    } == set()
    assert [attributes for tag, attributes in parsed.tags if tag == "script"] == [
        {"type": "application/json", "id": "report"}
    ]
    sources = [str(attributes["src"]) for tag, attributes in parsed.tags if tag == "img"]
    assert len(sources) == 16 * 3 + 1
    assert all(source.startswith("data:image/png;base64,iVBOR") for source in sources)
    (policy,) = (a["content"] for _, a in parsed.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert str(policy).startswith("default-src 'none';")


def test_page_is_small(report: Callable[..., Report], pictures: ReportPictures) -> None:
    assert len(render(report(), pictures).encode()) < 2_000_000


def test_report_is_embedded_as_json(report: Callable[..., Report]) -> None:
    original = report()
    (embedded,) = Page(render(original)).scripts
    assert Report.from_json(embedded) == original


def with_evil_layers(noise: NoiseBlock | None) -> NoiseBlock:
    assert noise is not None
    return noise.model_copy(
        update={"frontier": tuple(row.model_copy(update={"layer": EVIL}) for row in noise.frontier)}
    )


def evil_report(report: Callable[..., Report], quality: Callable[..., QualityRow]) -> Report:
    """Every text that can come from a model, a path or a message is an attack."""
    return report(
        command=EVIL,
        versions={EVIL: EVIL, "qdm-deploy": EVIL},
        machine={EVIL: [EVIL]},
        model={"name": EVIL, EVIL: {"deep": EVIL}},
        recipe={EVIL: EVIL, "list": [[EVIL]]},
        plan_summary={EVIL: EVIL},
        layers=(
            LayerRow(name=EVIL, precision="float", reason=EVIL),
            LayerRow(name=EVIL, precision="int8", scale=0.1, notes={EVIL: EVIL}),
        ),
        quality=(quality(sampler=EVIL),),
        speed=(SpeedRow(backend=EVIL, precision="int8", batch=1, median_ms=1.0, p95_ms=2.0, runs=3),),
        size=SizeBlock(float_bytes=9, int8_bytes={EVIL: 3}),
        inputs=tuple(item.model_copy(update={"layers": (EVIL,)}) for item in report().inputs),
        noise=with_evil_layers(report().noise),
        warnings=(EVIL,),
        seeds={EVIL: (0, 1)},
        engines=(
            EngineRow(backend=EVIL, sm=EVIL, planned=2, int8=1, kernels={EVIL: 1}, build_seconds=1.0, failures=(EVIL,)),
        ),
        checks=(CheckRow(name=EVIL, ok=False, detail=EVIL),),
        stage_seconds={EVIL: 1.0},
    )


def test_texts_cannot_become_markup(
    report: Callable[..., Report], quality: Callable[..., QualityRow], pictures: ReportPictures
) -> None:
    triplet = pictures.triplets[0]
    shown = ReportPictures(
        (Triplet(triplet.reference, triplet.quantized, triplet.difference, EVIL),), pictures.sheet, EVIL
    )
    page = render(evil_report(report, quality), shown)
    harmless = render(report(), ReportPictures(pictures.triplets[:1], pictures.sheet))

    parsed = Page(page)
    assert parsed.open == []
    assert {tag for tag, _ in parsed.tags} <= {tag for tag, _ in Page(harmless).tags} | {"ul"}
    assert [tag for tag, _ in parsed.tags].count("script") == 1
    assert [tag for tag, _ in parsed.tags].count("img") == 4
    assert not [name for _, attributes in parsed.tags for name in attributes if name.startswith("on")]
    assert len(svgs(page)) == len(re.findall("<svg", page))
    (embedded,) = parsed.scripts
    assert json.loads(embedded)["model"]["name"] == EVIL


def test_hostile_text_is_still_readable(report: Callable[..., Report], quality: Callable[..., QualityRow]) -> None:
    text = Page(render(evil_report(report, quality))).text
    assert text.count(EVIL) > 20


@pytest.mark.parametrize(
    ("left_out", "section"),
    [
        ({"quality": ()}, "Quality"),
        ({"engines": ()}, "Engine audit"),
        ({"checks": ()}, "Checks"),
        ({"rewrites": ()}, "Graphs"),
        ({"layers": ()}, "Layers"),
        ({"inputs": ()}, "Activation ranges over the timesteps"),
        ({"inputs": ()}, "Ranges at the skip concatenations"),
        ({"noise": None}, "Noise and the frontier"),
        ({}, "Images"),
    ],
)
def test_what_was_not_measured_has_no_section(
    report: Callable[..., Report], left_out: dict[str, Any], section: str
) -> None:
    page = render(report(**left_out))
    assert Page(page).open == []
    assert f"<h2>{section}</h2>" not in re.sub(r'<div class="card">.*?</div>', "", page)


def test_rewrites_are_counted_and_misses_are_told(report: Callable[..., Report]) -> None:
    text = " ".join(Page(render(report())).text)
    assert re.search(r"openvino\s+norms\s+61 of 61", text)
    assert re.search(r"openvino\s+SiLU\s+44 of 45\s+node_mul_3: two nodes read it", text)


def test_a_bare_report_is_a_page_too(report: Callable[..., Report]) -> None:
    bare = report(
        quality=(), engines=(), checks=(), rewrites=(), layers=(), inputs=(), noise=None, speed=(), speedup=None,
        command=None, stage_seconds={},
        size=SizeBlock(float_bytes=10, int8_bytes={}),
    )  # fmt: skip
    page = render(bare)
    assert Page(page).open == []
    assert "Made by a call from Python." in page


def test_latents_of_one_step(report: Callable[..., Report], quality: Callable[..., QualityRow]) -> None:
    row = quality(psnr_db=(), steps=1, timesteps=(999,), eps_sqnr_db=(30.0,), state_sqnr_db=(31.0,))
    page = render(report(quality=(row,)))
    assert Page(page).open == []
    assert "mean PSNR" not in "".join(Page(page).text)
    assert "30.0 dB at 999" in page


def test_the_frontier_is_drawn_against_time_where_layers_were_timed(report: Callable[..., Report]) -> None:
    noise = report().noise
    assert noise is not None
    assert "What they cost in time" not in render(report())
    rows = tuple(row.model_copy(update={"step_ms": 20.0 + index}) for index, row in enumerate(noise.frontier))
    timed = noise.model_copy(update={"frontier": rows, "step_ms": 21.0, "timed_on": "OpenVINO, a batch of 4"})
    page = render(report(noise=timed))
    assert "What they cost in time" in page
    assert "ms per step (OpenVINO, a batch of 4)" in page
    assert [f"<td>{20 + index}.0</td>" in page for index in range(len(rows))] == [True] * len(rows)
