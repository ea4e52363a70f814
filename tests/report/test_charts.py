import math
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qdm_deploy.report.charts import Bar, Line, bar_chart, line_chart, ticks

EVIL = "</title><script>alert('&')</script>"


def texts(svg: ET.Element, style: str) -> list[str]:
    return [element.text or "" for element in svg.iter("text") if element.get("class") == style]


def points(svg: ET.Element) -> list[tuple[float, ...]]:
    (curve,) = svg.iter("polyline")
    return [tuple(map(float, pair.split(","))) for pair in str(curve.get("points")).split()]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (25, 38, [25, 30, 35, 40]),
        (3, 3, [2, 2.5, 3, 3.5, 4]),
    ],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


@given(low=st.floats(-200, 200), span=st.floats(1e-3, 400))
def test_ticks_enclose_the_values(low: float, span: float) -> None:
    marks = ticks(low, low + span)
    tolerance = 1e-9 * (abs(low) + span)
    assert marks[0] <= low + tolerance
    assert marks[-1] >= low + span - tolerance
    assert 4 <= len(marks) <= 8


def test_curve_runs_from_noise_to_image_and_up_is_better() -> None:
    chart = line_chart([Line("openvino", ((900, 30.0), (450, 35.0), (0, 40.0)), 1)], title="t", y_label="SQNR in dB")
    svg = ET.fromstring(chart)  # noqa: S314  # our own text
    (x0, y0), (x1, y1), (x2, y2) = points(svg)
    assert x0 < x1 < x2
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1)
    assert y0 > y1 > y2
    assert texts(svg, "axis") == ["SQNR in dB", "timestep (noise on the left, image on the right)"]
    assert {"0", "800"} <= set(texts(svg, "tick"))
    assert [title.text for title in svg.iter("title")][1] == "openvino, timestep 900: 30.00 dB"


def test_threshold_lies_at_its_value() -> None:
    chart = line_chart([Line("a", ((1, 20.0), (0, 20.0)), 0)], title="t", y_label="dB", threshold=20.0)
    svg = ET.fromstring(chart)  # noqa: S314
    (threshold,) = (element for element in svg.iter("line") if element.get("class") == "threshold")
    assert float(str(threshold.get("y1"))) == points(svg)[0][1]


def test_one_step_is_a_chart_too() -> None:
    svg = ET.fromstring(line_chart([Line("a", ((999, 30.0),), 0)], title="t", y_label="dB"))  # noqa: S314
    ((x, y),) = points(svg)
    assert math.isfinite(x)
    assert math.isfinite(y)
    assert "999" in texts(svg, "tick")


def test_bars_are_as_long_as_their_values() -> None:
    chart = bar_chart(
        [Bar("float", 40.0, "40 ms", False, whisker=50.0), Bar("INT8", 20.0, "20 ms")], title="t", x_label="ms"
    )
    svg = ET.fromstring(chart)  # noqa: S314
    first, second = (float(str(bar.get("width"))) for bar in svg.iter("rect"))
    assert first == pytest.approx(2 * second, abs=0.1)
    assert texts(svg, "name") == ["float", "INT8"]
    assert texts(svg, "value") == ["40 ms", "20 ms"]
    assert texts(svg, "axis") == ["ms"]
    assert [bar.get("class") for bar in svg.iter("rect")] == ["bar", "bar emphasized"]
    assert len(list(svg.iter("path"))) == 1


def test_everything_fits_into_the_view() -> None:
    chart = bar_chart([Bar("a", 7.9, "7.9 ms", whisker=8.0)], title="t", x_label="ms")
    svg = ET.fromstring(chart)  # noqa: S314
    width = float(str(svg.get("viewBox")).split()[2])
    (value,) = (element for element in svg.iter("text") if element.get("class") == "value")
    assert float(str(value.get("x"))) + 9 * len("7.9 ms") < width


def test_names_are_escaped() -> None:
    line = line_chart([Line(EVIL, ((1, 2.0),), 0)], title=EVIL, y_label=EVIL)
    bar = bar_chart([Bar(EVIL, 1.0, EVIL)], title=EVIL, x_label=EVIL)
    for chart in (line, bar):
        assert "<script" not in chart
        assert ET.fromstring(chart).findtext("title") == EVIL  # noqa: S314
