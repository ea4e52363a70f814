"""Timestep bins: exact errors, an exact cut, and a number of bins that says why."""

from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from qdm_calibration.ranges import activation_scale
from qdm_calibration.step_bins import (
    GainInput,
    StepBins,
    check_step_bins,
    choose_step_bins,
    grid_errors,
    interval_costs,
    segment,
)
from qdm_deploy.artifacts.statistics import HISTOGRAM_BINS, TensorStatistics
from qdm_deploy.errors import CalibrationError, InputError

Values = list[list[NDArray[np.float64]]]  # by timestep bin and branch


def tensor(values: Values) -> TensorStatistics:
    branches = len(values[0])
    counts = np.zeros((len(values), branches, HISTOGRAM_BINS), dtype=np.int64)
    exponents = np.zeros((len(values), branches), dtype=np.int64)
    for m, row in enumerate(values):
        for g, x in enumerate(row):
            exponents[m, g] = int(np.ceil(np.log2(np.abs(x).max() * 1.000001)))
            limit = 2.0 ** exponents[m, g]
            counts[m, g] = np.histogram(x, HISTOGRAM_BINS, (-limit, limit))[0]
    edges = np.zeros((len(values), branches), dtype=np.float32)
    return TensorStatistics(counts, exponents, edges, edges)


def gaussians(*sizes: float, seed: int = 0, samples: int = 2000) -> GainInput:
    """Normal values whose deviation is ``sizes[m]`` in timestep bin m."""
    rng = np.random.default_rng(seed)
    return GainInput(tensor([[rng.normal(size=samples) * size] for size in sizes]), (1.0,))


def fine(bins: int) -> NDArray[np.int64]:
    return np.arange(bins + 1, dtype=np.int64) * (1000 // bins)


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("zero_offset", [False, True])
def test_errors_are_those_of_rounding_every_value(zero_offset: bool) -> None:
    rng = np.random.default_rng(0)
    values = [[rng.standard_t(4, 900) + 0.5, rng.uniform(-0.2, 3, 300)], [rng.normal(size=900), rng.random(300) * 9]]
    item = GainInput(tensor(values), (1.0, 0.25))
    scales, errors = grid_errors(item, zero_offset=zero_offset)
    assert errors.shape == (2, len(scales))
    offsets = _offsets(item, zero_offset)
    for m in range(2):
        noise, power = np.zeros(len(scales)), 0.0
        for g, factor in enumerate(item.factors):
            histogram = item.tensor.histogram(m, g)
            x = np.repeat(histogram.centers, histogram.counts)
            codes = np.rint(x[:, None] / factor / scales) - offsets
            noise += (((np.clip(codes, -128, 127) + offsets) * scales * factor - x[:, None]) ** 2).sum(axis=0)
            power += float((x**2).sum())
        np.testing.assert_allclose(errors[m], noise / power, rtol=1e-7)


def _offsets(item: GainInput, zero_offset: bool) -> Any:
    from qdm_calibration import step_bins

    return step_bins._candidates(*step_bins._extremes(item), zero_offset)[1]


@pytest.mark.parametrize("zero_offset", [False, True])
def test_the_candidates_hold_a_grid_nearly_as_good_as_the_plans_own_search(zero_offset: bool) -> None:
    rng = np.random.default_rng(1)
    normal, tails = rng.normal(size=4000), rng.standard_t(3, 4000)
    silu = normal / (1 + np.exp(-3 * normal))
    for x in (normal, tails, silu, np.abs(normal), -np.abs(tails)):
        item = GainInput(tensor([[x], [x * 3]]), (1.0,))
        for errors, m in zip(grid_errors(item, zero_offset=zero_offset)[1], (0, 1), strict=True):
            histogram = item.tensor.histogram(m)
            best = activation_scale([(histogram, 1.0)], "mse", zero_offset=zero_offset).error
            power = float((histogram.counts * histogram.centers**2).sum() / histogram.counts.sum())
            assert errors.min() < 1.25 * best / power  # within 1 dB: 160 grids in place of 700


def test_an_input_of_nothing_but_zeros_costs_nothing() -> None:
    values = tensor([[np.ones(5)], [np.ones(5)]])
    values.counts[1] = 0
    values.counts[1, 0, HISTOGRAM_BINS // 2] = 5
    values.exponents[1] = -39  # as for a tensor that is 0 throughout
    scales, errors = grid_errors(GainInput(values, (1.0,)), zero_offset=True)
    assert np.isfinite(scales).all()
    assert np.isfinite(errors).all()
    assert errors[0].min() < 1e-4


# ---------------------------------------------------------------------------------------------------------------- cuts


@pytest.mark.parametrize("seed", range(4))
def test_the_cut_is_the_best_of_all_cuts(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = 7
    costs = np.where(np.triu(np.ones((count + 1, count + 1)), 1) > 0, rng.random((count + 1, count + 1)), np.inf)
    for k, (cost, edges) in enumerate(segment(costs, count), start=1):
        every = [(0, *inner, count) for inner in combinations(range(1, count), k - 1)]
        prices = [sum(costs[i, j] for i, j in pairwise(cut)) for cut in every]
        assert cost == pytest.approx(min(prices), rel=1e-12)
        assert tuple(edges.tolist()) == every[int(np.argmin(prices))]


def test_the_whole_choice_is_the_best_of_all_choices() -> None:
    sizes = np.random.default_rng(3).uniform(0.3, 3, (3, 6))
    inputs = [gaussians(*row, seed=i) for i, row in enumerate(sizes)]
    weights = np.array([1.0, 2, 0, 1, 3, 1])
    errors = [grid_errors(item, zero_offset=True)[1] for item in inputs]

    def price(cut: tuple[int, ...]) -> float:
        """Every layer takes the grid that is best for the stretch, over all of them."""
        stretches = [slice(i, j) for i, j in pairwise(cut)]
        layers = [sum((layer[part] * weights[part, None]).sum(axis=0).min() for part in stretches) for layer in errors]
        return float(sum(layers) / weights.sum())

    for bins in (2, 3, 4):
        found = choose_step_bins(fine(6), inputs, bins, importance=lambda: weights)
        cuts = [(0, *inner, 6) for inner in combinations(range(1, 6), bins - 1)]
        best = min(cuts, key=price)
        assert found.edges.tolist() == [fine(6)[i] for i in best]
        assert found.costs == {1: pytest.approx(price((0, 6))), bins: pytest.approx(price(best))}


def test_more_bins_never_cost_more() -> None:
    inputs = [gaussians(*np.random.default_rng(4).uniform(0.5, 4, 32))]
    costs = interval_costs([grid_errors(item, zero_offset=True)[1] for item in inputs], np.ones(32))
    prices = [cost for cost, _ in segment(costs, 32)]
    assert all(later <= earlier + 1e-15 for earlier, later in pairwise(prices))
    assert prices[-1] == pytest.approx(sum(costs[i, i + 1] for i in range(32)))


# -------------------------------------------------------------------------------------------------------------- choice


def chosen(inputs: list[GainInput], bins: Any = "auto", **options: Any) -> StepBins:
    return choose_step_bins(fine(len(inputs[0].tensor.counts)), inputs, bins, **options)


def test_a_change_point_is_found_and_ends_the_search() -> None:
    found = chosen([gaussians(*[0.5] * 7, *[4.0] * 3)])
    assert found.edges.tolist() == [0, 700, 1000]
    assert sorted(found.costs) == [1, 2, 4, 8]
    assert found.costs[2] < 0.2 * found.costs[1]
    assert found.reason.startswith("2 bins, chosen automatically for 1 moving input: ")
    assert "4 would lower it by" in found.reason


def test_one_bin_is_enough_where_movement_makes_little_of_the_noise() -> None:
    # One timestep bin of eight would like a scale that is a quarter finer.
    found = chosen([gaussians(*[1.25] * 7, 1.0, samples=50_000)], gain_ratio=1.1)
    assert found.count == 1
    assert found.reason.startswith("one bin, chosen automatically for 1 moving input: 2 would lower the relative noise")


def test_inputs_that_do_not_move_have_no_say() -> None:
    still = [gaussians(*[1.0] * 5, *[1.05] * 5, seed=i, samples=50_000) for i in range(1, 9)]
    found = chosen([gaussians(*[1.0] * 3, *[3.0] * 7), *still], 2)
    assert found.edges.tolist() == [0, 300, 1000]
    assert found.reason.startswith("2 bins as asked for, cut by 1 moving input: ")


def test_what_matters_more_is_cut_first() -> None:
    # Two steps up of the same ratio; a wrong scale hurts the side where values are small.
    inputs = [gaussians(*[0.25] * 4, *[1.0] * 4, *[4.0] * 4)]
    early, late = np.repeat([100.0, 1, 1], 4), np.repeat([0.01, 1, 1], 4)
    assert chosen(inputs, 2, importance=lambda: early).edges[1] == fine(12)[4]
    assert chosen(inputs, 2, importance=lambda: late).edges[1] == fine(12)[8]


def test_nothing_is_measured_where_there_is_nothing_to_choose() -> None:
    def fail() -> Any:
        raise AssertionError

    still = [gaussians(*[1.0] * 6)]
    found = chosen(still, importance=fail)
    assert found.edges.tolist() == [0, 996]
    assert found.reason == "one bin, chosen automatically: no input's scale moves 1.3-fold"
    assert choose_step_bins(fine(4), [], 3, importance=fail).reason.startswith("one bin: every input stands behind")
    assert chosen([gaussians(1.0, 4.0)], 1, importance=fail).reason == "one step bin"
    assert chosen([gaussians(1.0, 4.0)], 2, importance=fail).edges.tolist() == [0, 500, 1000]
    assert chosen([gaussians(1.0)], importance=fail).count == 1


def test_a_given_number_is_kept_where_nothing_moves() -> None:
    found = chosen([gaussians(*[1.0] * 6)], 3, importance=lambda: pytest.fail("was asked for"))
    assert found.count == 3
    assert found.reason.startswith("3 bins as asked for, cut by no moving input: ")


def test_more_bins_than_timestep_ranges_are_refused() -> None:
    text = "5 step bins were asked for, but the calibration set only tells 4 timestep ranges apart"
    with pytest.raises(InputError, match=text):
        check_step_bins(fine(4), 5)
    check_step_bins(fine(4), 4)
    check_step_bins(fine(1), "auto")


@pytest.mark.parametrize("weights", [[1.0, 1.0], [1.0, -1.0, 1.0], [0.0, 0.0, 0.0], [1.0, float("nan"), 1.0]])
def test_weights_that_mean_nothing_are_refused(weights: list[float]) -> None:
    with pytest.raises(CalibrationError, match=r"3 weights of timestep bins are needed.*given: \["):
        chosen([gaussians(1.0, 2.0, 4.0)], 2, importance=lambda: np.array(weights))
