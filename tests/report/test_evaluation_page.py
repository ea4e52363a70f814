"""The page of an evaluation: the sentence first, every number in it, nothing fetched."""

import html
import json
import re
from typing import Any

import pytest

from qdm_deploy.report.evaluation import DistributionRow, Evaluation, PairedRow, Side, StepRow, frechet_sentence
from qdm_deploy.report.evaluation_page import render_evaluation

EVIL = "</script><script>alert(1)</script>$title"


def evaluation(**changes: Any) -> Evaluation:
    def side(precision: Any) -> Side:
        return Side(bundle="b.qdm", bundle_id="0" * 64, precision=precision, backend={"backend": "openvino"})

    rows = (
        DistributionRow(metric="Frechet distance, features", a=1.5, b=1.75, low=-0.125, high=0.5, floor=0.0625),
        DistributionRow(metric="recall", a=0.5, b=0.25, why_no_interval="balls shrink"),
    )
    values: dict[str, Any] = {
        "a": side("float"), "b": side("int8"), "images": 1000, "paired_seeds": 64, "sampler": "ddim", "steps": 2,
        "seed": 0, "guidance": 1.0, "classifier": "1" * 64, "classifier_accuracy": 0.92,
        "paired": (PairedRow(metric="image PSNR (dB)", seeds=64, mean=34.25, low=34, high=34.5, worst=28.125),),
        "per_step": tuple(
            StepRow(
                timestep=timestep, output=30.5, output_low=30.25, output_high=31, sample=40.5, sample_low=40,
                sample_high=41,
            )
            for timestep in (500, 0)
        ),
        "distribution": rows, "verdict": frechet_sentence(rows[0], 1000), "notes": (EVIL,),
    }  # fmt: skip
    return Evaluation(**{**values, **changes})


def texts(page: str) -> str:
    return html.unescape(re.sub(r"<[^>]+>", "|", page.partition("<body>")[2].partition("<script")[0]))


def test_the_verdict_is_first_and_every_number_follows() -> None:
    page = render_evaluation(evaluation())
    found = texts(page)
    order = ["No difference found", "is not distinguishable from zero at N = 1000", "Beside real images", "B beside A"]
    assert [found.index(part) for part in order] == sorted(found.index(part) for part in order)
    assert "Frechet distance, features||1.5||1.75||+0.25||-0.125 to +0.5||0.0625" in found
    assert "recall||0.5||0.25||-0.25||–||–" in found
    assert "recall: balls shrink." in found
    assert "image PSNR (dB)||64||34.25||34 to 34.5||28.12" in found
    assert "500||30.5 dB||30.2 to 31.0||40.5 dB||40.0 to 41.0" in found


@pytest.mark.parametrize(
    ("low", "high", "style", "headline"),
    [(-1, 1, "ship", "No difference found"), (0.5, 1, "stop", "A is closer"), (-1, -0.5, "ship", "B is closer")],
)
def test_the_headline_follows_the_interval(low: float, high: float, style: str, headline: str) -> None:
    row = DistributionRow(metric="Frechet distance, features", a=1.5, b=1.75, low=low, high=high)
    page = render_evaluation(evaluation(distribution=(row,)))
    assert f'<section id="verdict" class="{style}">' in page
    assert f"<h1>{headline}</h1>" in page


def test_without_real_images_there_is_no_such_section() -> None:
    found = texts(render_evaluation(evaluation(distribution=())))
    assert "Compared seed by seed" in found
    assert "Beside real images" not in found


def test_texts_are_escaped_and_the_data_is_embedded() -> None:
    original = evaluation()
    page = render_evaluation(original)
    assert page.count("<script") == 1
    assert "alert(1)" in texts(page)
    embedded = page.partition('id="report">')[2].partition("</script>")[0]
    assert Evaluation.model_validate(json.loads(embedded)) == original
    assert re.findall(r"https?:|url\(|@import", page) == []
