"""Box plots and the frontier show the numbers that the report holds, and nothing else."""

import re
from collections.abc import Callable
from xml.etree import ElementTree as ET

import pytest

from qdm_deploy.report import Report, render
from qdm_deploy.report.box_charts import box_chart, branch_chart
from qdm_deploy.report.charts import frontier_chart
from qdm_deploy.report.ranges import Box, InputRanges


def drawing(svg: str) -> ET.Element:
    return ET.fromstring(svg)  # noqa: S314  # our own text


def paths(svg: ET.Element, style: str) -> list[str]:
    return [str(path.get("d")) for path in svg.iter("path") if path.get("class") == style]


def heights(path: str) -> list[float]:
    return [float(y) for y in re.findall(r"M[\d.]+ ([\d.]+)h0", path)]


def scale_of(svg: ET.Element, axis: str, texts: str) -> Callable[[float], float]:
    """From a value to where the chart's own tick labels say that it lies."""
    anchor = "end" if axis == "y" else "middle"
    labels = [
        (float(str(text.text)), float(str(text.get(axis))))
        for text in svg.iter("text")
        if text.get("class") == texts and text.get("text-anchor") == anchor
    ]
    labels = [item for item in labels if axis == "x" or item[1] < 141]
    (low, start), (high, stop) = min(labels), max(labels)
    offset = 4.0 if axis == "y" else 0.0
    return lambda value: start - offset + (value - low) / (high - low) * (stop - start)


def test_boxes_lie_at_their_values_and_noise_is_on_the_left(box: Callable[..., Box]) -> None:
    svg = drawing(box_chart((box(0, 499), box(500, 999, 2.0)), (), title="t"))
    up = scale_of(svg, "y", "tick")
    (ends,) = paths(svg, "end")
    assert heights(ends) == pytest.approx([up(value) for value in (-4, 4, -8, 8)], abs=0.1)
    (bodies,) = paths(svg, "body")
    found = re.findall(r"M([\d.]+) ([\d.]+)h([\d.]+)V([\d.]+)h", bodies)
    (x0, low0, _, high0), (x1, low1, _, high1) = [tuple(map(float, item)) for item in found]
    assert x1 < x0
    assert (low0, high0, low1, high1) == pytest.approx(tuple(map(up, (-1, 1, -2, 2))), abs=0.1)
    (medians,) = paths(svg, "median")
    assert re.findall(r"M[\d.]+ ([\d.]+)h", medians) == [f"{up(0):.1f}"] * 2
    (stems,) = paths(svg, "stem")
    tips = [float(y) for y in re.findall(r"M[\d.]+ ([\d.]+)V", stems)]
    assert tips == pytest.approx([up(value) for value in (-2, 2, -4, 4)], abs=0.1)
    assert paths(svg, "reach") == []


def test_lines_show_what_int8_reaches_at_each_timestep(inputs: Callable[..., InputRanges]) -> None:
    svg = drawing(box_chart(inputs("a").boxes, inputs("a").grid, title="t"))
    up = scale_of(svg, "y", "tick")
    low, high = paths(svg, "reach")
    assert [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)H", low)] == pytest.approx([up(-3), up(-6)], abs=0.1)
    assert [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)H", high)] == pytest.approx([up(5), up(10)], abs=0.1)


def test_branches_share_one_axis(inputs: Callable[..., InputRanges]) -> None:
    concat = inputs("concat")
    svg = drawing(branch_chart(concat.branches, ("first", "second"), title="t"))
    across = scale_of(svg, "x", "tick")
    (ends,) = paths(svg, "end")
    found = [float(x) for x in re.findall(r"M([\d.]+) [\d.]+h0", ends)]
    assert found == pytest.approx([across(value) for value in (-4, 4, -2, 2)], abs=0.1)
    assert [text.text for text in svg.iter("text") if text.get("class") == "name"] == ["first", "second"]


def test_an_input_that_is_always_zero_is_a_chart_too(box: Callable[..., Box]) -> None:
    still = box(size=0.0)
    assert drawing(box_chart((still,), (), title="t")).tag == "svg"
    assert InputRanges(layers=("a",), boxes=(still, still)).movement == 0.0


def test_the_frontier_lies_at_its_values() -> None:
    chart = frontier_chart(
        [(1.0, 20.0, "all"), (0.5, 30.0, "<one>")],
        title="t",
        x_label="%",
        y_label="dB",
        chosen=(0.5, 30.0),
        threshold=25,
    )
    svg = drawing(chart)
    across, up = scale_of(svg, "x", "tick"), scale_of(svg, "y", "tick")
    dots = [circle for circle in svg.iter("circle") if circle.get("class") != "ring"]
    places = [(float(str(dot.get("cx"))), float(str(dot.get("cy")))) for dot in dots]
    assert places[0] == pytest.approx((across(100), up(20)), abs=0.1)
    assert places[1] == pytest.approx((across(50), up(30)), abs=0.1)
    (ring,) = (circle for circle in svg.iter("circle") if circle.get("class") == "ring")
    assert (ring.get("cx"), ring.get("cy")) == (dots[1].get("cx"), dots[1].get("cy"))
    assert [title.text for title in svg.iter("title")][1:] == ["all", "<one>"]


def test_inputs_that_move_most_come_first_and_the_rest_is_folded(
    report: Callable[..., Report], inputs: Callable[..., InputRanges]
) -> None:
    many = tuple(inputs(f"layer{index}", growth=1.0 + index) for index in range(20))
    page = render(report(inputs=many))
    section = page.partition("<h2>Activation ranges over the timesteps</h2>")[2].partition("</section>")[0]
    assert re.findall(r"<h3>layer(\d+) and 1 more</h3>", section) == [str(index) for index in range(19, -1, -1)]
    opened, _, folded = section.partition("<details")
    assert (opened.count("<svg"), folded.count("<svg")) == (12, 8)
    assert "The other 8 inputs" in folded
    assert "range moves 20.00-fold" in opened
    assert "Ranges at the skip concatenations" not in page


def test_branches_and_their_factors(report: Callable[..., Report], inputs: Callable[..., InputRanges]) -> None:
    page = render(report(inputs=(inputs("concat"), inputs("other"))))
    section = page.partition("<h2>Ranges at the skip concatenations</h2>")[2].partition("</section>")[0]
    assert "ranges differ 2.00-fold" in section
    assert "branch 1, 8 channels, k = 2" in section
    assert section.count("<svg") == 1


def test_the_noise_section_has_the_frontier(report: Callable[..., Report]) -> None:
    page = render(report(warnings=("keep_fp auto did not reach <25> dB.",)))
    section = page.partition("<h2>Noise and the frontier</h2>")[2].partition("</section>")[0]
    cells = re.findall(r"<td>(.*?)</td>", section)
    assert cells[4:] == ["noisy", "75 %", "50 %", "23.0 dB", "next", "50 %", "&lt; 0.1 %", "54.0 dB"]
    assert "1 of them stay in float" in section
    verdict = page.partition('<section id="verdict"')[2].partition("</section>")[0]
    assert "keep_fp auto did not reach &lt;25&gt; dB." in verdict


def test_layers_are_listed_with_the_noisiest_first(report: Callable[..., Report]) -> None:
    layers = report().layers
    shares = {7: 0.4, 30: 0.5, 2: 0.1}
    changed = tuple(layer.model_copy(update={"noise_share": shares.get(i)}) for i, layer in enumerate(layers))
    page = render(report(layers=changed))
    section = page.partition("<h3>The layers that add most noise</h3>")[2].partition("</section>")[0]
    noisiest, _, every = section.partition("<details")
    noisiest = noisiest.partition("</table>")[0]
    names = [layers[index].name.replace(".", ".<wbr>") for index in (30, 7, 2)]
    assert re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td>", noisiest) == list(
        zip(names, ["50 %", "40 %", "10 %"], strict=True)
    )
    assert re.findall(r"<tr><td>(.*?)</td><td>[\d–]", every)[:4] == [*names, layers[0].name.replace(".", ".<wbr>")]


def test_seeds_and_file_bytes_are_exact(report: Callable[..., Report]) -> None:
    page = render(report(seeds={"calibration": (0, 15), "verdict": (2**40, 2**40)}))
    assert "<dt>seeds of the calibration</dt><dd>0 to 15</dd>" in page
    assert f"<dt>seeds of the verdict</dt><dd>{2**40}</dd>" in page
    assert "<td>tensorrt · INT8</td><td>9 400 000</td><td>25.8 %</td>" in page


def test_a_box_whose_quantiles_fall_is_refused() -> None:
    with pytest.raises(ValueError, match=r"timesteps 0 to 9 and quantiles .* do not rise"):
        Box(first=0, last=9, quantiles=(0, 1, 2, 1, 3, 4, 5))
