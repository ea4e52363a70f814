"""How far apart two sets of pictures are, in the features of some classifier; all of it in float64.

These are the formulas of well-known metrics. Their published names stand for one network (Inception-v3) and its
features; with another classifier the values are comparable with each other only, so they carry plain names here.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.errors import InputError

__all__ = [
    "Gaussian",
    "classifier_score",
    "covered",
    "frechet_distance",
    "gaussian_of",
    "kernel_blocks",
    "kernel_distance",
    "kernel_mean",
    "precision_recall",
    "probabilities",
]

_ROWS = 1024

Array = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Gaussian:
    """Mean [D] and covariance [D, D] of a set of feature vectors, float64."""

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]

    @property
    def root(self) -> NDArray[np.float64]:
        """The symmetric square root of the covariance, [D, D]."""
        values, vectors = np.linalg.eigh(self.covariance)
        root: NDArray[np.float64] = (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T
        return root


def gaussian_of(features: Array) -> Gaussian:
    """Mean and unbiased covariance of feature vectors [N, D].

    Raises:
        InputError: fewer than two vectors, NaN or infinity.
    """
    exact = _vectors(features)
    mean = exact.mean(axis=0)
    centred = exact - mean
    return Gaussian(mean, centred.T @ centred / (len(exact) - 1))


def frechet_distance(first: Gaussian, second: Gaussian, *, first_root: NDArray[np.float64] | None = None) -> float:
    """Squared Frechet distance of two Gaussians (Dowson and Landau 1982; Heusel et al. 2017, eq. 6).

    |m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr((S1^1/2 S2 S1^1/2)^1/2). The product is symmetric, so its eigenvalues are
    real, which those of S1 S2 are not once they are rounded.

    Args:
        first: a Gaussian of D dimensions.
        second: another one.
        first_root: ``first.root``, where many are measured against the same one.

    Raises:
        InputError: unequal dimensions.
    """
    if first.mean.shape != second.mean.shape:
        raise InputError(
            f"features of {first.mean.size} and {second.mean.size} dimensions cannot be compared; use one classifier"
        )
    root = first.root if first_root is None else first_root
    product = root @ second.covariance @ root
    overlap = np.sqrt(np.clip(np.linalg.eigvalsh((product + product.T) / 2), 0.0, None)).sum()
    apart = np.sum((first.mean - second.mean) ** 2)
    return float(apart + np.trace(first.covariance) + np.trace(second.covariance) - 2.0 * overlap)


def kernel_distance(first: Array, second: Array, *, first_mean: float | None = None) -> float:
    """Unbiased squared maximum mean discrepancy, kernel (x.y / D + 1)^3 (Binkowski et al. 2018, section 4).

    It is zero on average for two sets of one distribution, so it can be negative; it is not clipped.

    Args:
        first: [N, D], N >= 2.
        second: [M, D], M >= 2.
        first_mean: ``kernel_mean(first)``, where many are measured against the same set.

    Raises:
        InputError: fewer than two vectors, unequal dimensions, NaN or infinity.
    """
    x, y = _same_dimension(first, second)
    own = kernel_mean(x) if first_mean is None else first_mean
    across = sum(float(block.sum()) for block in kernel_blocks(x, y)) / (len(x) * len(y))
    return own + kernel_mean(y) - 2.0 * across


def kernel_mean(features: Array) -> float:
    """Mean of that kernel over the pairs of different vectors of one set [N, D].

    Raises:
        InputError: fewer than two vectors, NaN or infinity.
    """
    x = _vectors(features)
    diagonal = _cubed(np.sum(x * x, axis=1) / x.shape[1] + 1.0)
    total = sum(float(block.sum()) for block in kernel_blocks(x, x)) - float(diagonal.sum())
    return total / (len(x) * (len(x) - 1))


def precision_recall(real: Array, made: Array, *, neighbours: int = 3) -> tuple[float, float]:
    """Share of pictures within the other set's support (Kynkaanniemi et al. 2019, eq. 1 and 2).

    Args:
        real: [N, D] features; N should be about M.
        made: [M, D] features.
        neighbours: k; a vector's ball reaches to its k-th nearest neighbour in its own set.

    Returns:
        Precision (made pictures in the balls of the real ones) and recall (the reverse), each in [0, 1].

    Raises:
        InputError: k or fewer vectors in a set, unequal dimensions, NaN or infinity.
    """
    x, y = _same_dimension(real, made)
    if neighbours < 1 or min(len(x), len(y)) <= neighbours:
        raise InputError(f"{min(len(x), len(y))} vectors have no {neighbours} neighbours each; give more vectors")
    return float(_inside(x, y, neighbours).mean()), float(_inside(y, x, neighbours).mean())


def covered(centres: Array, points: Array, *, neighbours: int = 3) -> NDArray[np.bool_]:
    """[M] whether each of the points [M, D] lies in a ball of the centres [N, D], as in ``precision_recall``.

    Raises:
        InputError: k or fewer centres, unequal dimensions, NaN or infinity.
    """
    x, y = _same_dimension(centres, points)
    if neighbours < 1 or len(x) <= neighbours:
        raise InputError(f"{len(x)} vectors have no {neighbours} neighbours each; give more vectors")
    return _inside(x, y, neighbours)


def probabilities(logits: Array) -> NDArray[np.float64]:
    """Softmax of logits [N, K] over K."""
    exact = _vectors(logits)
    powers = np.exp(exact - exact.max(axis=1, keepdims=True))
    result: NDArray[np.float64] = powers / powers.sum(axis=1, keepdims=True)
    return result


def classifier_score(logits: Array) -> float:
    """exp(mean KL(p(y|x) || p(y))) of a classifier's logits [N, K] (Salimans et al. 2016, section 4).

    1 where every picture gets the same answer, K where each gets one sure answer and all classes occur equally often.

    Raises:
        InputError: fewer than two pictures, NaN or infinity.
    """
    each = probabilities(logits)
    marginal = each.mean(axis=0)
    # A probability that underflowed to 0 contributes 0, the limit of p log p.
    ratio = np.where(each > 0, np.log(np.maximum(each, 1e-300)) - np.log(np.maximum(marginal, 1e-300)), 0.0)
    return float(np.exp(np.mean(np.sum(each * ratio, axis=1))))


def kernel_blocks(x: NDArray[np.float64], y: NDArray[np.float64]) -> Iterator[NDArray[np.float64]]:
    """The kernel of ``kernel_distance`` for x [N, D] and y [M, D], in blocks of rows [<= 1024, M].

    Only sums of it are ever needed, and all together would not fit into memory.
    """
    return (_cubed(x[start : start + _ROWS] @ y.T / x.shape[1] + 1.0) for start in range(0, len(x), _ROWS))


def _cubed(values: NDArray[np.float64]) -> NDArray[np.float64]:
    # Several times as fast as values**3, which calls pow for each.
    return values * values * values


def _inside(centres: NDArray[np.float64], points: NDArray[np.float64], neighbours: int) -> NDArray[np.bool_]:
    """Which points lie within at least one centre's ball."""
    inside = np.zeros(len(points), dtype=bool)
    for start in range(0, len(centres), _ROWS):
        rows = centres[start : start + _ROWS]
        # The nearest of its own set is the vector itself, at distance 0.
        radius = np.partition(_squared_distances(rows, centres), neighbours, axis=1)[:, neighbours]
        inside |= (_squared_distances(rows, points) <= radius[:, None]).any(axis=0)
    return inside


def _squared_distances(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    squares: NDArray[np.float64] = np.sum(x * x, axis=1)[:, None] + np.sum(y * y, axis=1) - 2.0 * (x @ y.T)
    return np.maximum(squares, 0.0)


def _same_dimension(first: Array, second: Array) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    x, y = _vectors(first), _vectors(second)
    if x.shape[1] != y.shape[1]:
        raise InputError(f"features of {x.shape[1]} and {y.shape[1]} dimensions cannot be compared; use one classifier")
    return x, y


def _vectors(features: Array) -> NDArray[np.float64]:
    if features.ndim != 2 or len(features) < 2:
        raise InputError(f"features of shape {list(features.shape)} describe no set; give [N, D] with at least 2 rows")
    if not np.isfinite(features).all():
        bad = np.count_nonzero(~np.isfinite(features))
        raise InputError(f"{bad} of {features.size} features are NaN or infinite: such a set has no distribution")
    return features.astype(np.float64)
