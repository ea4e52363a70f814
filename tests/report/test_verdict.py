from collections.abc import Callable
from typing import Any

import pytest

from qdm_deploy.report import CheckRow, EngineRow, QualityRow, Thresholds, Verdict, decide

GOOD = CheckRow(name="graph", ok=True, detail="as planned")
BAD = CheckRow(name="hashes", ok=False, detail="plan.json was changed")


@pytest.fixture
def judged(quality: Callable[..., QualityRow], engine: Callable[..., EngineRow]) -> Callable[..., Verdict]:
    """Decides on a good build with one thing changed."""

    def decide_on(**changes: Any) -> Verdict:
        values: dict[str, Any] = {
            "quality": (quality(),), "speedup": 1.5, "engines": (engine(),), "checks": (GOOD,),
            "thresholds": Thresholds(),
        }  # fmt: skip
        return decide(**{**values, **changes})

    return decide_on


def test_a_good_build_ships_and_says_why(judged: Callable[..., Verdict]) -> None:
    verdict = judged()
    assert verdict.ship
    assert verdict.problems == ()
    assert verdict.merits == (
        "The check “graph” holds.",
        "openvino: the images have a mean PSNR of 40.00 dB (required: 30.00; worst of 16: 38.00).",
        "openvino: the model's output has a mean SQNR of 34.00 dB (required: 25.00; worst step, timestep 0: 30.00).",
        "INT8 runs 1.50 times as fast as float (required: 1.00).",
        "The tensorrt-rtx engine for SM 8.9 runs all 42 planned layers in INT8.",
    )


def test_each_failed_check_is_a_problem(judged: Callable[..., Verdict]) -> None:
    verdict = judged(checks=(GOOD, BAD))
    assert not verdict.ship
    assert verdict.problems == ("The check “hashes” failed: plan.json was changed",)
    assert "All 2 checks hold." not in verdict.merits
    assert judged(checks=(GOOD, GOOD)).merits[0] == "All 2 checks hold."


def test_every_measured_target_counts(judged: Callable[..., Verdict], quality: Callable[..., QualityRow]) -> None:
    verdict = judged(quality=(quality(), quality("tensorrt", psnr_db=(29.0,) * 16, eps_sqnr_db=(24.0,) * 20)))
    assert not verdict.ship
    assert verdict.problems == (
        (
            "tensorrt (simulation): the images have a mean PSNR of 29.00 dB "
            "(too low, required: 30.00; worst of 16: 29.00)."
        ),
        (
            "tensorrt (simulation): the model's output has a mean SQNR of 24.00 dB "
            "(too low, required: 25.00; worst step, timestep 950: 24.00)."
        ),
    )


def test_latents_are_judged_by_the_output(judged: Callable[..., Verdict], quality: Callable[..., QualityRow]) -> None:
    verdict = judged(quality=(quality(psnr_db=()),))
    assert verdict.ship
    assert "openvino: the samples are latents, so the model's output alone is judged." in verdict.merits
    assert not judged(quality=(quality(psnr_db=(), eps_sqnr_db=(20.0,) * 20),)).ship


@pytest.mark.parametrize(
    ("speedup", "ship", "shown"),
    [
        (1.2, True, "1.20 times as fast as float (required: 1.20)"),
        (1.1999, False, "1.19 times as fast as float (too low"),
    ],
)
def test_thresholds_are_met_by_equality_and_not_by_rounding(
    judged: Callable[..., Verdict], speedup: float, ship: bool, shown: str
) -> None:
    verdict = judged(speedup=speedup, thresholds=Thresholds(min_speedup=1.2))
    assert verdict.ship == ship
    assert [reason for reason in verdict.reasons if shown in reason]


def test_speed_that_was_not_measured_is_a_problem_unless_none_is_asked_for(judged: Callable[..., Verdict]) -> None:
    assert judged(speedup=None).problems == (
        "The speed was not compared with the float graph's, so the required speed-up of 1.00 cannot be judged.",
    )
    assert judged(speedup=None, thresholds=Thresholds(min_speedup=0)).ship


def test_a_build_without_measurements_does_not_ship(judged: Callable[..., Verdict]) -> None:
    assert judged(quality=()).problems == ("Quality was not measured, so it cannot be judged.",)
    assert judged(checks=()).problems == ("No check was run, so the bundle's integrity is unknown.",)


def test_an_engine_that_is_not_all_int8_is_a_problem(
    judged: Callable[..., Verdict], engine: Callable[..., EngineRow]
) -> None:
    verdict = judged(engines=(engine(), engine(sm="12.0", int8=40, failures=("conv1 runs in half.", "conv2 too."))))
    assert verdict.problems == (
        "The tensorrt-rtx engine for SM 12.0 runs 40 of 42 planned layers in INT8. First: conv1 runs in half.",
    )
    assert judged(engines=(engine(int8=41),)).problems == (
        "The tensorrt-rtx engine for SM 8.9 runs 41 of 42 planned layers in INT8.",
    )
    assert judged(engines=(engine(planned=0, int8=0),)).problems == (
        "The tensorrt-rtx engine for SM 8.9 has no layer that is planned in INT8.",
    )


def test_no_engine_is_no_problem(judged: Callable[..., Verdict]) -> None:
    assert judged(engines=()).ship
