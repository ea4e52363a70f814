"""Errors per step against sums written out, and their intervals over seeds."""

import numpy as np
import pytest

from qdm_deploy.errors import InputError
from qdm_deploy.metrics.error import sqnr_db, sqnr_per_step_db
from qdm_deploy.metrics.paired_steps import StepErrors, energies, sqnr_curve

SEEDS, STEPS = 12, 3


@pytest.fixture(scope="module")
def runs() -> tuple[np.ndarray, np.ndarray]:
    """Two runs [S, N, C, H, W]; the second is the first with noise that grows from step to step and seed to seed."""
    generator = np.random.default_rng(0)
    first = generator.standard_normal((STEPS, SEEDS, 2, 3, 4), dtype=np.float32)
    size = np.linspace(0.01, 0.05, SEEDS)[None, :] * np.arange(1, STEPS + 1)[:, None]
    noise = generator.standard_normal(first.shape, dtype=np.float32) * size[:, :, None, None, None]
    return first, (first + noise).astype(np.float32)


def errors_of(runs: tuple[np.ndarray, np.ndarray]) -> StepErrors:
    return StepErrors(*energies(*runs))


def test_each_step_is_what_a_report_says_of_all_seeds(runs: tuple[np.ndarray, np.ndarray]) -> None:
    curve = sqnr_curve(errors_of(runs))
    expected = sqnr_per_step_db(*runs)
    assert [step.value for step in curve.steps] == pytest.approx(expected)
    assert curve.mean.value == pytest.approx(np.mean(expected))
    worst = min(np.mean([sqnr_db(a[seed], b[seed]) for a, b in zip(*runs, strict=True)]) for seed in range(SEEDS))
    assert curve.worst == pytest.approx(worst)
    for interval in (*curve.steps, curve.mean):
        assert interval.low < interval.value < interval.high


def test_the_interval_is_that_of_the_resampled_seeds(runs: tuple[np.ndarray, np.ndarray]) -> None:
    curve = sqnr_curve(errors_of(runs), resamples=50, seed=3)
    generator = np.random.default_rng(3)
    draws = []
    for _ in range(50):
        rows = generator.integers(0, SEEDS, SEEDS)
        draws.append(sqnr_per_step_db(*(run[:, rows] for run in runs)))
    found = [(step.low, step.high) for step in curve.steps]
    assert np.allclose(found, np.percentile(draws, [2.5, 97.5], axis=0).T)
    assert np.allclose((curve.mean.low, curve.mean.high), np.percentile(np.mean(draws, axis=1), [2.5, 97.5]))


def test_equal_runs_have_the_upper_limit_and_a_silent_reference_the_lower_one() -> None:
    one, zero = np.ones((4, 2)), np.zeros((4, 2))
    assert sqnr_curve(StepErrors(one, zero), resamples=5).mean.low == 200
    assert sqnr_curve(StepErrors(zero, one), resamples=5).mean.high == -200


def test_what_has_no_curve_is_refused() -> None:
    with pytest.raises(InputError, match=r"shape \[4, 2\] and \[4, 3\] are no errors per step"):
        sqnr_curve(StepErrors(np.ones((4, 2)), np.ones((4, 3))))
    with pytest.raises(InputError, match="2000 resamples of 1 values"):
        sqnr_curve(StepErrors(np.ones((1, 2)), np.ones((1, 2))))
