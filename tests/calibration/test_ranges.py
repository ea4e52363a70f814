"""Scales and codes, by hand and by property."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from qdm_calibration.ranges import (
    METHODS,
    ActivationScale,
    activation_scale,
    float16_exact,
    quantize_weight,
    weight_levels,
    weight_scale,
)
from qdm_deploy.artifacts.recipe import RangeMethod
from qdm_deploy.artifacts.statistics import HISTOGRAM_BINS, Histogram
from qdm_deploy.errors import InputError

SMALLEST = 2.0**-14  # the smallest normal float16


def histogram(values: NDArray[np.float64], exponent: int | None = None) -> Histogram:
    if exponent is None:
        exponent = int(np.ceil(np.log2(np.abs(values).max() * (1 + 1e-6))))
    return Histogram(np.histogram(values, HISTOGRAM_BINS, (-(2.0**exponent), 2.0**exponent))[0], exponent)


def decoded(x: NDArray[np.float64], grid: ActivationScale) -> NDArray[np.float64]:
    codes = np.clip(np.rint(x / grid.scale) - grid.zero_offset, -128, 127)
    return (codes + grid.zero_offset) * grid.scale


def sqnr_db(x: NDArray[np.float64], approximation: NDArray[np.float64]) -> float:
    return float(10 * np.log10((x**2).sum() / ((x - approximation) ** 2).sum()))


def spike(*centers: float) -> Histogram:
    """One value in each of these bins' middles; the bins of exponent 3 are 2**-8 wide."""
    counts = np.zeros(HISTOGRAM_BINS, dtype=np.int64)
    for center in centers:
        counts[int((center + 8) * 256)] += 1
    return Histogram(counts, 3)


HALF = 2.0**-9  # half of such a bin


# -------------------------------------------------------------------------------------------------------------- weights


def test_golden_weight_codes() -> None:
    weight = np.array([[-3.0, 1.3, 2.4, 16.0]], dtype=np.float32)
    scale = weight_scale(weight, "minmax")
    # 16 / 127 = 0.12598425 lies between the float16 neighbours 0.12597656 and 0.12609863, nearer to the first.
    assert scale.tolist() == [0.1259765625]
    assert scale.dtype == np.float32
    # -23.81, 10.32, 19.05 and 127.008 steps: the last is clipped to 127.
    codes = quantize_weight(weight, scale)
    assert codes.tolist() == [[-24, 10, 19, 127]]
    assert codes.dtype == np.int8


def test_weight_codes_round_half_to_even_and_are_symmetric() -> None:
    weight = np.array([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 130.0, -130.0, 127.4, -127.6]], dtype=np.float32)
    codes = quantize_weight(weight, np.array([1.0], dtype=np.float32))
    assert codes.tolist() == [[0, 2, 2, 0, -2, -2, 127, -127, 127, -127]]  # never -128


def test_weight_scales_are_per_output_channel() -> None:
    weight = np.zeros((3, 2, 1, 2), dtype=np.float32)
    weight[0, 1, 0, 0], weight[1, 0, 0, 1] = -127.0, 254.0
    scale = weight_scale(weight, "minmax")
    assert scale.tolist() == [1.0, 2.0, SMALLEST]  # an all-zero channel has the smallest scale, not 0 or NaN
    codes = quantize_weight(weight, scale)
    assert codes[0].ravel().tolist() == [0, 0, -127, 0]
    assert codes[1].ravel().tolist() == [0, 127, 0, 0]
    assert not codes[2].any()


@pytest.mark.parametrize("method", METHODS)
def test_weight_scales_are_normal_float16(method: RangeMethod) -> None:
    weight = np.random.default_rng(0).normal(size=(5, 40)).astype(np.float32) * np.float32(10.0) ** np.arange(
        -8, 2, 2
    ).reshape(5, 1)
    scale = weight_scale(weight.astype(np.float32), method)
    np.testing.assert_array_equal(scale, scale.astype(np.float16).astype(np.float32))
    assert scale.min() == SMALLEST


@given(st.integers(0, 2**32 - 1), st.integers(-4, 4), st.sampled_from(METHODS))
def test_weight_properties(seed: int, power: int, method: RangeMethod) -> None:
    rng = np.random.default_rng(seed)
    weight = (rng.standard_t(3, size=(6, 5, 3)) * 2.0 ** rng.integers(-2, 3, size=(6, 1, 1))).astype(np.float32)
    scale = weight_scale(weight, method)
    codes = quantize_weight(weight, scale)
    shaped = scale.reshape(-1, 1, 1)
    inside = np.abs(weight) <= 127 * shaped
    assert (np.abs(weight - codes * shaped)[inside] <= (shaped / 2 * (1 + 1e-6) + 0 * weight)[inside]).all()
    np.testing.assert_array_equal(quantize_weight(codes * shaped, scale), codes)  # idempotent
    np.testing.assert_array_equal(quantize_weight(-weight, scale), -codes)
    order = rng.permutation(6)
    np.testing.assert_array_equal(weight_scale(weight[order], method), scale[order])
    assume(scale.min() * 2.0**power >= SMALLEST * 2)  # where no scale is at the floor, powers of two pass through
    np.testing.assert_array_equal(weight_scale(weight * np.float32(2.0**power), method), scale * np.float32(2.0**power))


@pytest.mark.parametrize(("method", "power"), [("mse", 2.0), ("lp", 2.4)])
def test_searched_weight_scales_beat_minmax_and_match_brute_force(method: RangeMethod, power: float) -> None:
    weight = np.random.default_rng(1).standard_t(3, size=(4, 300)).astype(np.float32)

    def error(scale: NDArray[np.float32]) -> NDArray[np.float64]:
        codes = np.clip(np.rint(weight / scale[:, None]), -127, 127)
        return (np.abs(weight.astype(np.float64) - codes * scale[:, None]) ** power).sum(axis=1)

    full, searched = weight_scale(weight, "minmax"), weight_scale(weight, method)
    assert (error(searched) <= error(full)).all()
    assert (error(searched) < 0.95 * error(full)).any()
    everything = np.arange(full.min() * 0.5, full.max() * 1.05, 2e-5).astype(np.float16).astype(np.float32)
    best = np.min([error(np.full(4, s, dtype=np.float32)) for s in np.unique(everything)], axis=0)
    assert (error(searched) <= 1.08 * best).all()


# ---------------------------------------------------------------------------------------------------------- activations


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.1, 0.0999755859375), (1.0, 1.0), (2.0**-14, 2.0**-14), (2.0**-15, 2.0**-14), (0.0, 2.0**-14)],
)
def test_scales_are_normal_float16(value: float, expected: float) -> None:
    assert float16_exact(value) == expected


def test_minmax_by_hand_symmetric() -> None:
    # The largest magnitude is 2.54 less or more half a bin: bin 650 begins at 2.5390625.
    grid = activation_scale([(spike(-1.0, 2.54), 1.0)], "minmax", zero_offset=False)
    assert grid.zero_offset == 0
    assert grid.scale == float(np.float16((2.5390625 + HALF) / 127)) == 0.02000427246093750


def test_minmax_by_hand_with_an_offset() -> None:
    # Values from -1 to 4.1 (bin 1049 begins at 4.09765625), so 255 steps of about 0.02.
    grid = activation_scale([(spike(-1.0, 4.1), 1.0)], "minmax", zero_offset=True)
    low, high = -1.0 + HALF, 4.09765625 + HALF
    assert grid.scale == float(np.float16((high - low) / 255))
    # low / s = -49.9, so the lowest code -128 stands for step -50: z = 78.
    assert grid.zero_offset == 78
    assert (-128 + grid.zero_offset) * grid.scale == pytest.approx(low, abs=grid.scale)
    assert (127 + grid.zero_offset) * grid.scale == pytest.approx(high, abs=grid.scale)


@pytest.mark.parametrize(("values", "offset"), [((1.0, 4.0), 128), ((-4.0, -1.0), -127)])
def test_one_sided_data_keeps_zero_on_the_grid(values: tuple[float, ...], offset: int) -> None:
    # Positive data: step 0 is code -128 (u8 code 0). Negative data: it is code 127 (u8 code 255).
    grid = activation_scale([(spike(*values), 1.0)], "minmax", zero_offset=True)
    assert grid.zero_offset == offset
    assert decoded(np.zeros(1), grid)[0] == 0.0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("zero_offset", [False, True])
def test_an_all_zero_tensor_has_the_smallest_scale(method: RangeMethod, zero_offset: bool) -> None:
    counts = np.zeros(HISTOGRAM_BINS, dtype=np.int64)
    counts[HISTOGRAM_BINS // 2] = 7
    grid = activation_scale([(Histogram(counts, -39), 1.0)], method, zero_offset=zero_offset)
    assert grid.scale == SMALLEST
    assert np.isfinite(grid.error)
    assert decoded(np.zeros(1), grid)[0] == 0.0


def test_percentile_drops_the_tails() -> None:
    values = np.concatenate([np.random.default_rng(0).uniform(-1, 1, 200_000), [60.0, -50.0]])
    everything, most = (
        activation_scale([(histogram(values), 1.0)], m, zero_offset=False) for m in ("minmax", "percentile")
    )
    assert everything.scale * 127 == pytest.approx(60, rel=0.01)
    assert most.scale * 127 == pytest.approx(1, rel=0.05)


@given(st.integers(0, 2**32 - 1), st.sampled_from(METHODS), st.booleans(), st.integers(-3, 3))
def test_activation_properties(seed: int, method: RangeMethod, zero_offset: bool, power: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.normal(rng.uniform(-1, 1), 1.0, 500) * rng.choice([0.1, 1.0, 3.0], 500)
    grid = activation_scale([(histogram(values), 1.0)], method, zero_offset=zero_offset)
    assert grid.scale >= SMALLEST
    assert grid.scale == float(np.float16(grid.scale))
    assert -127 <= grid.zero_offset <= 128
    assert zero_offset or grid.zero_offset == 0
    low, high = (-128 + grid.zero_offset) * grid.scale, (127 + grid.zero_offset) * grid.scale
    assert low <= 0 <= high
    inside = (values >= low) & (values <= high)
    back = decoded(values, grid)
    assert (np.abs(values - back)[inside] <= grid.scale / 2 * (1 + 1e-9)).all()
    np.testing.assert_array_equal(decoded(back, grid), back)  # idempotent
    # A power of two changes the scale by itself and nothing else: float16 keeps its mantissa.
    moved = histogram(values)
    again = activation_scale([(Histogram(moved.counts, moved.exponent + power), 1.0)], method, zero_offset=zero_offset)
    assert (again.scale, again.zero_offset) == (grid.scale * 2.0**power, grid.zero_offset)


@given(st.integers(0, 2**32 - 1), st.sampled_from(["mse", "lp"]), st.booleans())
def test_a_search_never_loses_to_the_whole_range_in_its_own_metric(
    seed: int, method: RangeMethod, zero_offset: bool
) -> None:
    rng = np.random.default_rng(seed)
    values = rng.standard_t(2, 800) + rng.uniform(-2, 2)
    seen = [(histogram(values), 1.0)]
    whole, searched = (activation_scale(seen, m, zero_offset=zero_offset) for m in ("minmax", method))
    power = {"mse": 2.0, "lp": 2.4}[method]
    centers, counts = seen[0][0].centers, seen[0][0].counts

    def error(grid: ActivationScale) -> float:
        return float((counts * np.abs(centers - decoded(centers, grid)) ** power).sum() / counts.sum())

    assert searched.error == pytest.approx(error(searched), rel=1e-9)
    assert searched.error <= error(whole) * (1 + 1e-9)


@pytest.mark.parametrize("zero_offset", [False, True])
@pytest.mark.parametrize(("method", "power"), [("mse", 2.0), ("lp", 2.4)])
def test_the_search_is_close_to_brute_force(method: RangeMethod, power: float, zero_offset: bool) -> None:
    values = np.random.default_rng(2).laplace(0.3, 1.0, 3000)
    seen = histogram(values)
    filled = seen.counts > 0
    centers, counts = seen.centers[filled], seen.counts[filled]
    searched = activation_scale([(seen, 1.0)], method, zero_offset=zero_offset)
    amax = np.abs(values).max()
    best = np.inf
    scales = np.unique(np.linspace(amax / 127 * 0.2, amax / 127 * 1.01, 150).astype(np.float16).astype(np.float64))
    for scale in scales:
        for offset in range(-127, 129, 3) if zero_offset else (0,):
            error = float(
                (counts * np.abs(centers - decoded(centers, ActivationScale(scale, offset, 0))) ** power).sum()
                / counts.sum()
            )
            best = min(best, error)
    assert searched.error <= 1.05 * best


def test_an_offset_helps_one_sided_data_by_more_than_3_db() -> None:
    x = np.random.default_rng(0).normal(0.5, 1.5, 50_000)
    silu = x / (1 + np.exp(-x))
    symmetric, shifted = (activation_scale([(histogram(silu), 1.0)], "mse", zero_offset=z) for z in (False, True))
    gain = sqnr_db(silu, decoded(silu, shifted)) - sqnr_db(silu, decoded(silu, symmetric))
    assert gain > 3.0
    assert shifted.zero_offset > 80  # -0.278 is near the grid's lower end


def test_a_factor_lets_two_branches_use_the_whole_grid() -> None:
    rng = np.random.default_rng(0)
    wide, narrow = rng.normal(size=5000) * 8, rng.normal(size=5000)
    plain = activation_scale([(histogram(wide), 1.0), (histogram(narrow), 1.0)], "minmax", zero_offset=False)
    factored = activation_scale([(histogram(wide), 1.0), (histogram(narrow), 0.125)], "minmax", zero_offset=False)
    assert factored.scale == pytest.approx(plain.scale, rel=0.1)  # narrow / 0.125 reaches as far as wide
    before = sqnr_db(narrow, decoded(narrow, plain))
    after = sqnr_db(narrow, decoded(narrow / 0.125, factored) * 0.125)
    assert after - before == pytest.approx(20 * np.log10(8), abs=2)


def test_errors_of_several_histograms_count_in_units_of_x() -> None:
    first, second = spike(1.0, 2.0), spike(0.25, 3.1)
    grid = activation_scale([(first, 1.0), (second, 0.5)], "minmax", zero_offset=False)
    x1, x2 = first.centers[first.counts > 0], second.centers[second.counts > 0]
    expected = np.concatenate([x1 - decoded(x1, grid), x2 - decoded(x2 / 0.5, grid) * 0.5])
    assert grid.error == pytest.approx(float((expected**2).mean()), rel=1e-12)


def test_an_unknown_method_is_refused() -> None:
    text = r"range method 'entropy' is not known; choose one of minmax, percentile, mse, lp"
    with pytest.raises(InputError, match=text):
        activation_scale([(spike(1.0), 1.0)], "entropy", zero_offset=False)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=text):
        weight_scale(np.ones((1, 1), dtype=np.float32), "entropy")  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------------------- 4 bits


def test_golden_weight_codes_of_4_bits() -> None:
    weight = np.array([[-3.0, 1.3, 2.4, 7.0]], dtype=np.float32)
    scale = weight_scale(weight, "minmax", 4)
    assert scale.tolist() == [1.0]
    assert quantize_weight(weight * 2, scale, 4).tolist() == [[-6, 3, 5, 7]]


def test_a_searched_range_of_4_bits_beats_the_largest_magnitude_by_decibels() -> None:
    weight = np.random.default_rng(0).normal(size=(4, 2000))
    weight[:, 0] = 10.0

    def decibels(method: RangeMethod) -> float:
        scale = weight_scale(weight.astype(np.float32), method, 4)
        return sqnr_db(weight, quantize_weight(weight.astype(np.float32), scale, 4) * scale[:, None])

    assert decibels("mse") > decibels("minmax") + 5


def test_another_number_of_weight_bits_is_refused() -> None:
    with pytest.raises(InputError, match="weights of 5 bits were asked for; choose 8 or 4"):
        weight_levels(5)
