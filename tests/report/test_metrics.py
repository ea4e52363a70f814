import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qdm_deploy.errors import InputError
from qdm_deploy.metrics.error import (
    DECIBEL_LIMIT,
    max_abs_difference,
    psnr_db,
    psnr_per_image_db,
    sqnr_db,
    sqnr_per_step_db,
)

METRICS = (sqnr_db, psnr_db, max_abs_difference)


def test_sqnr_of_known_energies() -> None:
    # Signal 3^2 + 4^2 = 25, noise 0.25: 10 log10 100 = 20 dB.
    assert sqnr_db(np.array([3.0, 4.0]), np.array([3.0, 4.5])) == pytest.approx(20.0)
    # No difference of scale is forgiven: half the values are a quarter of the energy off.
    assert sqnr_db(np.array([3.0, 4.0]), np.array([1.5, 2.0])) == pytest.approx(20 * np.log10(2))


@given(scale=st.floats(1e-3, 1e3), error=st.floats(1e-4, 10.0))
def test_sqnr_depends_on_the_relative_error_alone(scale: float, error: float) -> None:
    reference = np.linspace(-1, 1, 11) * scale
    assert sqnr_db(reference, reference * (1 + error)) == pytest.approx(-20 * np.log10(error), abs=1e-6)


def test_float32_arrays_are_measured_in_float64() -> None:
    # In float32, the sum of 2^24 ones and one more is 2^24, and 1e30 squared is infinite.
    assert sqnr_db(np.full(4, 1e30, np.float32), np.full(4, 2e30, np.float32)) == pytest.approx(0.0, abs=1e-6)
    reference = np.array([4096.0, 1.0], np.float32)
    expected = 10 * np.log10(4096.0**2 + 1)
    assert sqnr_db(reference, np.array([4096.0, 0.0], np.float32)) == pytest.approx(expected, abs=1e-12)


def test_decibels_have_limits() -> None:
    ones = np.ones(3)
    assert sqnr_db(ones, ones) == sqnr_db(0 * ones, 0 * ones) == psnr_db(ones, ones) == DECIBEL_LIMIT == 200.0
    assert sqnr_db(np.zeros(3), ones) == sqnr_db(ones * 1e-20, ones) == -200.0
    assert sqnr_db(ones, ones + 1e-12) == 200.0


def test_psnr_has_a_peak_of_two() -> None:
    # An error of 0.2 everywhere: 10 log10(4 / 0.04) = 20 dB, as an error of 0.1 on [0, 1].
    assert psnr_db(np.full(5, 0.5), np.full(5, 0.3)) == pytest.approx(20.0)


def test_psnr_sees_what_a_picture_shows() -> None:
    assert psnr_db(np.array([1.0, 5.0, -1.0]), np.array([1.7, 1.0, -9.0])) == 200.0
    # 1.5 is shown as 1.0, so the error is 0.5 and not 1.
    assert psnr_db(np.array([1.5]), np.array([0.5])) == pytest.approx(10 * np.log10(4 / 0.25))


def test_each_step_and_each_image_counts_alone() -> None:
    a = np.zeros((2, 1, 2, 2), np.float32)
    a[1] = 0.5
    b = a.copy()
    b[1] = 0.3
    assert psnr_per_image_db(a, b) == pytest.approx((200.0, 20.0), abs=1e-5)
    assert sqnr_per_step_db([a[0], a[1]], iter([b[0], b[1]])) == pytest.approx((200.0, 20 * np.log10(2.5)), abs=1e-5)


def test_largest_difference() -> None:
    assert max_abs_difference(np.array([1.0, -2.0]), np.array([1.5, 1.0])) == 3.0


@pytest.mark.parametrize("metric", METRICS)
def test_unequal_shapes_are_refused(metric) -> None:
    # These two would broadcast.
    with pytest.raises(InputError, match=r"shape \[2, 3\] and \[3\] cannot be compared"):
        metric(np.zeros((2, 3)), np.zeros(3))
    with pytest.raises(InputError, match=r"shape \[0\] and \[0\] cannot be compared; give equal shapes, not empty"):
        metric(np.zeros(0), np.zeros(0))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_refused(metric, bad: float) -> None:
    fine, broken = np.zeros(3), np.array([0.0, bad, bad])
    with pytest.raises(InputError, match="2 of 3 values of the second array are NaN or infinite"):
        metric(fine, broken)
    with pytest.raises(InputError, match="2 of 3 values of the first array are NaN or infinite"):
        metric(broken, fine)


@pytest.mark.parametrize("metric", [sqnr_per_step_db, psnr_per_image_db])
def test_unequal_numbers_of_steps_are_refused(metric) -> None:
    with pytest.raises(InputError, match="3 results cannot be compared with 2"):
        metric(np.zeros((3, 4)), np.zeros((2, 4)))
    with pytest.raises(InputError, match="0 results cannot be compared with 0"):
        metric([], [])
