"""Distances of sets against closed forms and against scipy's matrix square root."""

import numpy as np
import pytest
from scipy.linalg import sqrtm

from qdm_deploy.errors import InputError
from qdm_deploy.metrics.bootstrap import mean_interval, resampled_indices
from qdm_deploy.metrics.distribution import (
    Gaussian,
    classifier_score,
    covered,
    frechet_distance,
    gaussian_of,
    kernel_distance,
    kernel_mean,
    precision_recall,
    probabilities,
)
from qdm_deploy.metrics.paired_distribution import frechet_difference, kernel_difference, score_difference


def gaussian(mean: float, variance: float, dimensions: int = 3) -> Gaussian:
    return Gaussian(np.full(dimensions, mean), np.eye(dimensions) * variance)


def normal(count: int, dimensions: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, dimensions))


def test_frechet_distance_of_known_gaussians() -> None:
    # D ((m1 - m2)^2 + (s1 - s2)^2) for isotropic ones.
    assert frechet_distance(gaussian(0, 1), gaussian(2, 9)) == pytest.approx(3 * (4 + 4))
    assert frechet_distance(gaussian(1, 4), gaussian(1, 4)) == pytest.approx(0, abs=1e-12)


def test_frechet_distance_equals_the_formula_with_a_matrix_root() -> None:
    mixing = normal(8, seed=3)
    first, second = gaussian_of(normal(100, seed=1) @ mixing), gaussian_of(normal(90, seed=2) * 2 + 0.5)
    expected = (
        np.sum((first.mean - second.mean) ** 2)
        + np.trace(first.covariance)
        + np.trace(second.covariance)
        - 2 * np.trace(sqrtm(first.covariance @ second.covariance).real)
    )
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(second, first) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_survives_singular_covariances() -> None:
    flat = gaussian_of(np.repeat(normal(5), 2, axis=1))
    assert frechet_distance(flat, flat) == pytest.approx(0, abs=1e-6)


def test_covariance_is_that_of_numpy() -> None:
    features = normal(50)
    assert np.allclose(gaussian_of(features).covariance, np.cov(features, rowvar=False))


def test_kernel_distance_is_unbiased() -> None:
    same = [kernel_distance(normal(40, seed=2 * i), normal(30, seed=2 * i + 1)) for i in range(300)]
    error = np.std(same) / np.sqrt(len(same))
    assert abs(np.mean(same)) < 4 * error
    assert min(same) < 0 < max(same)
    assert kernel_distance(normal(40), normal(30, seed=1) + 1) > 100 * abs(np.mean(same))


def test_kernel_distance_equals_its_definition() -> None:
    x, y = normal(1100, 4, seed=4), normal(6, 4, seed=5)

    def mean(first: np.ndarray, second: np.ndarray, own: bool) -> float:
        values = (first @ second.T / 4 + 1) ** 3
        keep = ~np.eye(len(first), dtype=bool) if own else np.ones(values.shape, dtype=bool)
        return float(values[keep].mean())

    expected = mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)
    assert kernel_distance(x, y) == pytest.approx(expected, rel=1e-9)
    assert kernel_distance(x, y, first_mean=kernel_mean(x)) == kernel_distance(x, y)


def test_precision_and_recall_of_known_sets() -> None:
    real = normal(200, 2)
    assert precision_recall(real, real) == (1, 1)
    assert precision_recall(real, real + 100) == (0, 0)
    # Pictures of one kind only: each is good, but most of the real ones are never made.
    precision, recall = precision_recall(real, real[:1] + 1e-3 * normal(200, 2, seed=1))
    assert precision > 0.9
    assert recall < 0.1


def test_precision_takes_the_third_neighbour() -> None:
    real = np.array([[0.0], [1.0], [2.0], [3.0]])
    made = np.array([[-2.9], [-3.1], [6.1], [5.9]])
    assert precision_recall(real, made)[0] == 0.5


def test_classifier_score_of_sure_and_of_undecided_answers() -> None:
    assert classifier_score(np.tile(np.eye(10) * 1000, (3, 1))) == pytest.approx(10)
    assert classifier_score(np.zeros((5, 10))) == pytest.approx(1)
    assert classifier_score(np.tile(np.eye(10)[:1] * 9, (4, 1))) == pytest.approx(1)
    assert np.allclose(probabilities(np.array([[0.0, np.log(3)], [5.0, 5.0]])), [[0.25, 0.75], [0.5, 0.5]])


def test_a_difference_that_is_there_is_seen_and_none_is_not() -> None:
    real = gaussian_of(normal(2000, seed=9))
    a = normal(300, seed=10)
    noise = 0.02 * normal(300, seed=11)
    assert frechet_difference(real, a, a, resamples=50).holds_zero
    assert frechet_difference(real, a, a + noise, resamples=200).holds_zero
    worse = frechet_difference(real, a, a + 0.5, resamples=200)
    assert not worse.holds_zero
    assert 0 < worse.low < worse.value < worse.high
    better = frechet_difference(real, a + 0.5, a, resamples=200)
    assert (better.value, better.low, better.high) == pytest.approx((-worse.value, -worse.high, -worse.low))


def test_pairing_narrows_the_interval() -> None:
    real = gaussian_of(normal(2000, seed=9))
    a = normal(300, seed=10)
    paired = frechet_difference(real, a, a + 0.1, resamples=200)
    unpaired = frechet_difference(real, a, np.random.default_rng(0).permutation(a) + 0.1, resamples=200)
    assert paired.high - paired.low < 0.7 * (unpaired.high - unpaired.low)


def test_the_kernel_difference_is_that_of_the_draws_written_out() -> None:
    real, a = normal(40, seed=1), normal(9, seed=2)
    b = a + 0.3 * normal(9, seed=3)
    found = kernel_difference(real, a, b, resamples=30, seed=4)
    assert found.value == pytest.approx(kernel_distance(real, b) - kernel_distance(real, a), rel=1e-5)

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return float((x @ y / len(x) + 1) ** 3)

    def distance(made: np.ndarray, rows: np.ndarray) -> float:
        pairs = [(i, j) for i in rows for j in rows if i != j]  # two seeds, never one with itself
        within = np.mean([kernel(made[i], made[j]) for i, j in pairs])
        return float(within - 2 * np.mean([kernel(made[i], other) for i in rows for other in real]))

    generator = np.random.default_rng(4)
    draws = []
    for _ in range(30):
        rows = generator.integers(0, 9, 9)
        draws.append(distance(b, rows) - distance(a, rows))
    assert np.allclose((found.low, found.high), np.percentile(draws, [2.5, 97.5]), rtol=1e-4)


def test_the_kernel_difference_sees_a_shift_and_no_noise() -> None:
    real, a = normal(500, seed=1), normal(300, seed=2)
    assert kernel_difference(real, a, a, resamples=50).holds_zero
    worse = kernel_difference(real, a, a + 0.5, resamples=200)
    assert 0 < worse.low < worse.value < worse.high


def test_the_score_difference_is_that_of_the_draws_written_out() -> None:
    a = 3 * normal(50, seed=5)
    b = a + normal(50, seed=6)
    found = score_difference(a, b, resamples=40, seed=7)
    assert found.value == pytest.approx(classifier_score(b) - classifier_score(a))
    generator = np.random.default_rng(7)
    draws = []
    for _ in range(40):
        rows = generator.integers(0, 50, 50)
        draws.append(classifier_score(b[rows]) - classifier_score(a[rows]))
    assert np.allclose((found.low, found.high), np.percentile(draws, [2.5, 97.5]))


def test_covered_points_are_what_precision_and_recall_count() -> None:
    real, made = normal(60, seed=8), normal(50, seed=9) * 1.5
    precision, recall = precision_recall(real, made)
    assert 0 < precision < 1
    assert (covered(real, made).mean(), covered(made, real).mean()) == (precision, recall)
    assert covered(np.array([[0.0], [1.0], [3.0]]), np.array([[-0.9], [2.2], [6.0]]), neighbours=1).tolist() == [
        True, True, False,
    ]  # fmt: skip


def test_mean_interval_is_that_of_the_normal_approximation() -> None:
    values = np.random.default_rng(0).normal(5, 2, size=400)
    found = mean_interval(values.tolist())
    assert found.value == pytest.approx(values.mean())
    half = 1.96 * values.std() / 20
    assert found.low == pytest.approx(values.mean() - half, abs=0.05)
    assert found.high == pytest.approx(values.mean() + half, abs=0.05)
    assert found == mean_interval(values.tolist())
    assert found != mean_interval(values.tolist(), seed=1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gaussian_of(np.zeros((1, 3))), r"shape \[1, 3\] describe no set; give \[N, D\] with at least 2 rows"),
        (lambda: gaussian_of(np.full((2, 3), np.nan)), "6 of 6 features are NaN or infinite"),
        (lambda: frechet_distance(gaussian(0, 1, 2), gaussian(0, 1, 3)), "features of 2 and 3 dimensions cannot be"),
        (lambda: kernel_distance(np.zeros((4, 2)), np.zeros((4, 3))), "features of 2 and 3 dimensions cannot be"),
        (lambda: precision_recall(np.zeros((3, 2)), np.zeros((9, 2))), "3 vectors have no 3 neighbours each"),
        (lambda: covered(np.zeros((3, 2)), np.zeros((9, 2))), "3 vectors have no 3 neighbours each"),
        (lambda: kernel_difference(normal(4, 3), normal(4, 3), normal(5, 3)), r"\[4, 3\] and \[5, 3\] are no pairs"),
        (lambda: score_difference(normal(4, 3), normal(5, 3)), r"\[4, 3\] and \[5, 3\] are no pairs"),
        (lambda: frechet_difference(gaussian(0, 1), normal(4, 3), normal(5, 3)), r"\[4, 3\] and \[5, 3\] are no pairs"),
        (lambda: resampled_indices(1), "2000 resamples of 1 values give no interval"),
        (lambda: mean_interval([1.0, float("inf")]), "1 of 2 values are NaN or infinite"),
    ],
)
def test_what_has_no_distance_is_refused(call: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()  # type: ignore[operator]
