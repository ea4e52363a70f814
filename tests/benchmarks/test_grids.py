"""The grids of the papers' tables: other measures of an error, fewer bits, and the product's own where they agree."""

from typing import Any

import numpy as np
import pytest
import torch
from lab.grids import MEASURES, levels_of, narrowed, regridded, searched_grid, searched_weights
from numpy.typing import NDArray

from qdm_calibration.ranges import ActivationScale, activation_scale, weight_scale
from qdm_calibration.rows import run_rows
from qdm_calibration.simulate import simulate
from qdm_deploy.artifacts.statistics import HISTOGRAM_BINS, Histogram

EIGHT = levels_of(8)


def histogram(values: NDArray[np.float64], exponent: int | None = None) -> Histogram:
    if exponent is None:
        exponent = int(np.ceil(np.log2(np.abs(values).max() * (1 + 1e-6))))
    return Histogram(np.histogram(values, HISTOGRAM_BINS, (-(2.0**exponent), 2.0**exponent))[0], exponent)


def decoded(x: NDArray[np.float64], grid: ActivationScale) -> NDArray[np.float64]:
    codes = np.clip(np.rint(x / grid.scale) - grid.zero_offset, -128, 127)
    return (codes + grid.zero_offset) * grid.scale


@pytest.mark.parametrize("options", [{"step_bins": 1}, {"step_bins": 2, "concat_scales": "branch"}])
def test_the_squared_error_gives_the_products_own_plan(tiny: Any, options: dict[str, Any]) -> None:
    plan = tiny.plan("labels", ranges="mse", **options)
    again = regridded(tiny.checkpoint("labels").unet, plan, tiny.statistics("labels"), "mse")
    assert any(layer.inverse_k is not None for layer in plan.quantized)
    for one, other in zip(plan.quantized, again.quantized, strict=True):
        assert (one.scale, one.zero_offset, one.weight_sqnr_db) == (
            other.scale,
            other.zero_offset,
            other.weight_sqnr_db,
        )
        np.testing.assert_array_equal(one.codes, other.codes)
        np.testing.assert_array_equal(one.weight_scales, other.weight_scales)


def test_other_measures_choose_other_grids(tiny: Any) -> None:
    plan = tiny.plan("labels", ranges="mse", step_bins=1)
    network, statistics = tiny.checkpoint("labels").unet, tiny.statistics("labels")
    scales = {
        measure: [layer.scale for layer in regridded(network, plan, statistics, measure).quantized]
        for measure in MEASURES
    }
    # Where few values are large, the cosine chooses what the squared error does.
    assert scales["l1"] != scales["mse"] != scales["kl"] != scales["l1"]


def test_fewer_bits_are_simulated_and_cost_what_they_should(tiny: Any) -> None:
    network, calibration = tiny.checkpoint("labels").unet, tiny.calibration("labels")
    plan = tiny.plan("labels", ranges="mse", step_bins=1)
    rows = np.arange(8)
    errors = {}
    with torch.inference_mode():
        expected = run_rows(network, calibration, rows)
        for bits in (8, 6):
            grids = regridded(network, plan, tiny.statistics("labels"), "mse", bits=bits)
            assert {layer.weight_bits for layer in grids.quantized} == {8}
            found = run_rows(narrowed(simulate(network, grids, "tensorrt"), bits), calibration, rows)
            errors[bits] = float((found - expected).square().mean())
    # Four times the step is 12 dB; the search clips harder where codes are few.
    assert 6 < 10 * np.log10(errors[6] / errors[8]) < 13


@pytest.mark.parametrize("zero_offset", [False, True])
def test_cosine_is_that_of_the_values_and_as_good_as_any_grid(zero_offset: bool) -> None:
    values = np.random.default_rng(3).standard_t(3, 3000) + 0.5
    seen = histogram(values)
    x = np.repeat(seen.centers, seen.counts)

    def turned(grid: ActivationScale) -> float:
        back = decoded(x, grid)
        return float(1 - x @ back / np.sqrt((x @ x) * (back @ back)))

    found = searched_grid([(seen, 1.0)], "cosine", zero_offset=zero_offset, levels=EIGHT)
    assert found.error == pytest.approx(turned(found), rel=1e-6)
    amax = np.abs(values).max()
    offsets = range(-127, 129, 6) if zero_offset else (0,)
    for scale in np.linspace(amax / 127 * 0.1, amax / 127 * 1.01, 60).astype(np.float16).astype(np.float64):
        assert all(found.error <= 1.05 * turned(ActivationScale(scale, offset, 0)) for offset in offsets)


def test_cosine_of_weights_is_that_of_each_row() -> None:
    weight = np.random.default_rng(4).standard_t(3, size=(4, 300)).astype(np.float32)

    def turned(scale: NDArray[np.float32]) -> NDArray[np.float64]:
        back = np.clip(np.rint(weight / scale[:, None]), -7, 7) * scale[:, None].astype(np.float64)
        return np.array(
            [1 - w @ b / (np.linalg.norm(w) * np.linalg.norm(b)) for w, b in zip(weight, back, strict=True)]
        )

    full, searched = weight_scale(weight, "minmax", 4), searched_weights(weight, "cosine", 4)
    assert (turned(searched) < 0.9 * turned(full)).all()
    best = np.min(
        [turned((full * part).astype(np.float16).astype(np.float32)) for part in np.linspace(0.35, 1, 200)], 0
    )
    assert (turned(searched) <= 1.1 * best).all()


def divergence(seen: Histogram, grid: ActivationScale) -> float:
    """KL(P || Q) bin by bin, in plain Python."""
    total = int(seen.counts.sum())
    p: dict[int, float] = {}
    by_code: dict[int, list[int]] = {}
    below = above = 0.0
    for i in range(HISTOGRAM_BINS):
        if not seen.counts[i]:
            continue
        code = round(seen.centers[i] / grid.scale) - grid.zero_offset
        if code < -128:
            below += seen.counts[i] / total
        elif code > 127:
            above += seen.counts[i] / total
        else:
            p[i] = seen.counts[i] / total
            by_code.setdefault(code, []).append(i)
    inside = sum(p.values())
    q = {i: sum(p[j] for j in bins) / len(bins) / inside for bins in by_code.values() for i in bins}
    p[min(p)] += below
    p[max(p)] += above
    return sum(p[i] * np.log(p[i] / q[i]) for i in p)


@pytest.mark.parametrize("zero_offset", [False, True])
def test_kl_is_that_of_entropy_calibration(zero_offset: bool) -> None:
    values = np.concatenate([np.random.default_rng(5).laplace(0.2, 1.0, 20_000), [30.0]])
    seen = histogram(values)
    found = searched_grid([(seen, 1.0)], "kl", zero_offset=zero_offset, levels=EIGHT)
    whole = activation_scale([(seen, 1.0)], "minmax", zero_offset=zero_offset)
    assert found.error == pytest.approx(divergence(seen, found), rel=1e-6)
    assert found.error < divergence(seen, whole)  # the lone outlier is clipped
    assert found.scale < whole.scale
    for part in np.linspace(0.2, 1.0, 30):
        symmetric = ActivationScale(float(np.float16(whole.scale * part)), whole.zero_offset if zero_offset else 0, 0)
        assert zero_offset or found.error <= 1.1 * divergence(seen, symmetric)


def test_kl_of_two_histograms_is_that_of_what_the_grid_sees() -> None:
    rng = np.random.default_rng(6)
    first, second = rng.normal(size=5000), rng.normal(size=5000)
    # The second tensor is eight times smaller and has the factor 1/8: the grid sees one distribution.
    both = [(histogram(np.concatenate([first, second]), 3), 1.0)]
    each = [(histogram(first, 3), 1.0), (histogram(second / 8, 0), 0.125)]
    joined, apart = (searched_grid(seen, "kl", zero_offset=False, levels=EIGHT) for seen in (both, each))
    assert (apart.scale, apart.error) == (joined.scale, pytest.approx(joined.error, rel=1e-9))
