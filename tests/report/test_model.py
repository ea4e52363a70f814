import json
from collections.abc import Callable

import numpy as np
import pytest
from pydantic import ValidationError

from qdm_deploy.artifacts.plan import LayerPlan
from qdm_deploy.artifacts.topology import Layer
from qdm_deploy.errors import InputError
from qdm_deploy.report import LayerRow, QualityRow, Report, SpeedRow, Thresholds, Verdict


def test_report_survives_json(report: Callable[..., Report]) -> None:
    original = report()
    assert Report.from_json(original.to_json()) == original
    assert json.loads(original.to_json())["schema_version"] == "1.0"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"schema_version": "2.0"}, r"schema 1\.0 \(schema_version: Input should be '1\.0'\)"),
        ({"surprise": 1}, r"\(surprise: Extra inputs are not permitted\)"),
        ({"created": "2026-01-31T12:00:00"}, r"\(created: Input should have timezone info\)"),
        ({"speedup": 0}, r"\(speedup: Input should be greater than 0\)"),
    ],
)
def test_what_is_no_report_is_refused(report: Callable[..., Report], change: dict[str, object], problem: str) -> None:
    document = {**json.loads(report().to_json()), **change}
    with pytest.raises(InputError, match=problem):
        Report.from_json(json.dumps(document))


def test_damaged_json_is_refused(report: Callable[..., Report]) -> None:
    with pytest.raises(InputError, match=r"not a qdm-deploy report of schema 1\.0 \(document: Invalid JSON"):
        Report.from_json(report().to_json()[:-20])


def test_summaries_of_a_quality_row(quality: Callable[..., QualityRow]) -> None:
    row = quality(
        samples=2, timesteps=(900, 500, 0), eps_sqnr_db=(30.0, 24.0, 36.0), state_sqnr_db=(50.0, 40.0, 33.0),
        psnr_db=(35.0, 38.0),
    )  # fmt: skip
    assert (row.eps_sqnr_mean_db, row.eps_sqnr_min_db, row.worst_timestep) == (30.0, 24.0, 500)
    assert (row.psnr_mean_db, row.psnr_min_db, row.state_sqnr_final_db) == (36.5, 35.0, 33.0)


def test_latents_have_no_psnr(quality: Callable[..., QualityRow]) -> None:
    row = quality(psnr_db=())
    assert (row.psnr_mean_db, row.psnr_min_db) == (None, None)


def test_label_says_what_ran_where(quality: Callable[..., QualityRow]) -> None:
    assert quality("openvino").label == "openvino"
    assert quality("tensorrt").label == "tensorrt (simulation)"


@pytest.mark.parametrize("field", ["eps_sqnr_db", "state_sqnr_db"])
def test_a_value_for_each_step(quality: Callable[..., QualityRow], field: str) -> None:
    with pytest.raises(ValidationError, match=f"{field} has 2 values for 20 timesteps"):
        quality(**{field: (1.0, 2.0)})


def test_a_psnr_for_each_sample(quality: Callable[..., QualityRow]) -> None:
    with pytest.raises(ValidationError, match="psnr_db has 1 values for 16 samples"):
        quality(psnr_db=(30.0,))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_json_cannot_hold_is_refused(quality: Callable[..., QualityRow], value: float) -> None:
    with pytest.raises(ValidationError, match="finite number"):
        quality(max_abs=value)


def test_samples_per_second() -> None:
    row = SpeedRow(backend="openvino", precision="int8", batch=16, median_ms=40.0, p95_ms=50.0, runs=5)
    assert row.samples_per_second == 400.0


def test_verdict_and_its_problems_agree() -> None:
    asked = Thresholds()
    with pytest.raises(ValidationError, match="ship is True with 1 problems"):
        Verdict(ship=True, problems=("Too slow.",), merits=(), thresholds=asked)
    with pytest.raises(ValidationError, match="ship is False with 0 problems"):
        Verdict(ship=False, problems=(), merits=("Small.",), thresholds=asked)
    verdict = Verdict(ship=False, problems=("Too slow.",), merits=("Small.",), thresholds=asked)
    assert (verdict.headline, verdict.reasons) == ("DO NOT SHIP", ("Too slow.", "Small."))


def layer(name: str = "up_blocks.0.conv") -> Layer:
    return Layer(name=name, kind="conv", weight_shape=(4, 2, 3, 3), input_group=name, branches=(1, 1), normalized=True)


def test_row_of_an_int8_layer() -> None:
    plan = LayerPlan(
        layer=layer(), precision="int8", scale=0.5, zero_offset=-3,
        inverse_k=np.array([0.25, 2.0], np.float32), inverse_r=np.array([1.0, 0.125], np.float32),
        weight_sqnr_db=41.5, notes={"s": "measured"},
    )  # fmt: skip
    assert LayerRow.from_plan(plan) == LayerRow(
        name="up_blocks.0.conv", precision="int8", scale=0.5, zero_offset=-3, branch_factors=(0.5, 4.0),
        step_gains=(1.0, 8.0), weight_sqnr_db=41.5, notes={"s": "measured"},
    )  # fmt: skip


def test_row_of_a_float_layer() -> None:
    row = LayerRow.from_plan(LayerPlan(layer=layer(), precision="float", reason="last layer"))
    assert row == LayerRow(name="up_blocks.0.conv", precision="float", reason="last layer", scale=None)
