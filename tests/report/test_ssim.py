"""SSIM against its definition, window by window, and against values known in closed form."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from qdm_deploy.errors import InputError
from qdm_deploy.metrics.ssim import ssim_per_image


def pictures(count: int = 2, channels: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (count, channels, 14, 17)).astype(np.float32)


def test_equal_pictures_are_alike() -> None:
    assert ssim_per_image(pictures(), pictures()) == pytest.approx((1, 1))
    assert ssim_per_image(pictures() * 9, np.clip(pictures() * 9, -1, 1)) == pytest.approx((1, 1))


def test_two_flat_pictures_differ_in_luminance_only() -> None:
    dark, bright = np.full((1, 1, 11, 11), -0.5, np.float32), np.full((1, 1, 11, 11), 0.5, np.float32)
    expected = (2 * 0.25 * 0.75 + 1e-4) / (0.25**2 + 0.75**2 + 1e-4)
    assert ssim_per_image(dark, bright) == pytest.approx((expected,), rel=1e-6)


def test_it_is_the_definition_with_a_gaussian_window() -> None:
    a, b = pictures(), np.clip(pictures() + 0.3 * pictures(seed=1), -1, 1)
    for found, first, second in zip(ssim_per_image(a, b), (a[:, 0] + 1) / 2, (b[:, 0] + 1) / 2, strict=True):

        def blur(picture: np.ndarray) -> np.ndarray:
            return gaussian_filter(picture.astype(np.float64), 1.5, radius=5)[5:-5, 5:-5]

        ma, mb = blur(first), blur(second)
        va, vb, cov = blur(first**2) - ma**2, blur(second**2) - mb**2, blur(first * second) - ma * mb
        expected = (2 * ma * mb + 1e-4) * (2 * cov + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))
        assert found == pytest.approx(expected.mean(), abs=1e-6)


def test_channels_are_averaged() -> None:
    a, b = pictures(channels=3), pictures(channels=3, seed=1)
    each = [ssim_per_image(a[:, c : c + 1], b[:, c : c + 1]) for c in range(3)]
    assert ssim_per_image(a, b) == pytest.approx(np.mean(each, axis=0))


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (pictures(2), pictures(1), r"shape \[2, 1, 14, 17\] and \[1, 1, 14, 17\] cannot be compared"),
        (pictures()[:, :, :10], pictures()[:, :, :10], "pictures of 10x17 pixels have no SSIM: its window needs 11x11"),
        (pictures() * np.nan, pictures(), "476 pixels are NaN or infinite"),
    ],
)
def test_what_has_no_ssim_is_refused(a: np.ndarray, b: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ssim_per_image(a, b)
