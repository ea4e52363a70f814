"""Which rows of the trajectory are drawn."""

import numpy as np
import pytest

from qdm_calibration.timesteps import SamplingPlan, sampling_plan
from qdm_deploy.samplers import StepTable


def table(steps: int, total: int = 1000) -> StepTable:
    timesteps = np.linspace(total - 1, 0, steps).round().astype(np.int64)
    return StepTable("ddim", timesteps, np.zeros((steps, 7), dtype=np.float32))


@pytest.mark.parametrize(
    ("steps", "wanted", "chosen"),
    [
        (10, 5, [0, 2, 4, 6, 8, 9]),  # the last step is added where the stride stops short of it
        (9, 5, [0, 1, 2, 3, 4, 5, 6, 7, 8]),  # 9 // 5 = 1
        (9, 4, [0, 2, 4, 6, 8]),
        (5, 20, [0, 1, 2, 3, 4]),  # fewer steps than wanted: all of them
        (1, 1, [0]),
    ],
)
def test_uniform_takes_every_cth_step_and_the_last(steps: int, wanted: int, chosen: list[int]) -> None:
    draw = sampling_plan(SamplingPlan(samples=3, steps=wanted), table(steps), 1000, seed=0)
    assert np.unique(draw.step).tolist() == chosen
    pairs = {(int(sample), int(step)) for sample, step in zip(draw.sample, draw.step, strict=True)}
    assert len(pairs) == len(draw.step) == 3 * len(chosen)  # every trajectory once at every chosen step
    assert {sample for sample, _ in pairs} == {0, 1, 2}


def test_uniform_does_not_depend_on_the_seed() -> None:
    first, second = (sampling_plan(SamplingPlan(), table(50), 1000, seed=seed) for seed in (0, 1))
    np.testing.assert_array_equal(first.step, second.step)
    np.testing.assert_array_equal(first.sample, second.sample)


def test_ndtc_has_the_mean_and_spread_it_was_asked_for() -> None:
    plan = SamplingPlan(strategy="ndtc", samples=4, count=20_000, mean=0.5, spread=0.1)
    every = table(1000)
    t = every.timesteps[sampling_plan(plan, every, 1000, seed=3).step]
    # 20 000 draws: the mean is known to 100 / sqrt(20000) = 0.7, the spread to 0.5; the floor moves the mean by -0.5.
    assert t.mean() == pytest.approx(499.5, abs=3)
    assert t.std() == pytest.approx(100, abs=3)


def test_ndtc_scales_with_t() -> None:
    plan = SamplingPlan(strategy="ndtc", count=20_000, mean=0.25, spread=0.05)
    every = table(200, total=200)
    t = every.timesteps[sampling_plan(plan, every, 200, seed=0).step]
    assert (t.mean(), t.std()) == (pytest.approx(49.5, abs=0.5), pytest.approx(10, abs=0.5))


def test_ndtc_clamps_the_tails_into_the_trajectory() -> None:
    # Mean 0.4 and spread 0.4: Phi(-1) = 15.9 % of the mass lies below 0 and Phi(-1.5) = 6.7 % above T.
    plan = SamplingPlan(strategy="ndtc", count=20_000, mean=0.4, spread=0.4)
    every = table(1000)
    t = every.timesteps[sampling_plan(plan, every, 1000, seed=0).step]
    assert np.mean(t == 0) == pytest.approx(0.159, abs=0.01)
    assert np.mean(t == 999) == pytest.approx(0.067, abs=0.01)


def test_ndtc_uses_the_sampler_step_nearest_to_each_draw() -> None:
    plan = SamplingPlan(strategy="ndtc", count=5_000, mean=0.5, spread=0.2)
    coarse, fine = table(5), table(1000)
    drawn = fine.timesteps[sampling_plan(plan, fine, 1000, seed=1).step]
    kept = coarse.timesteps[sampling_plan(plan, coarse, 1000, seed=1).step]
    # Both are sorted by step, that is by falling timestep; 999, 749, 500, 250 and 0 are the coarse sampler's.
    nearest = coarse.timesteps[np.abs(coarse.timesteps[None] - drawn[:, None]).argmin(axis=1)]
    np.testing.assert_array_equal(np.sort(kept), np.sort(nearest))


def test_ndtc_is_seeded_counts_exactly_and_shares_the_trajectories_evenly() -> None:
    plan = SamplingPlan(strategy="ndtc", samples=7, count=100)
    first, again, other = (sampling_plan(plan, table(50), 1000, seed=seed) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first.step, again.step)
    assert (first.step != other.step).any()
    assert len(first.step) == len(first.sample) == 100
    assert sorted(np.bincount(first.sample)) == [14] * 5 + [15] * 2
    assert (np.diff(first.step) >= 0).all()
