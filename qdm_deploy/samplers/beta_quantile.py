"""Quantiles of the symmetric beta distribution, without scipy."""

import math

import numpy as np
from numpy.typing import NDArray

__all__ = ["symmetric_beta_quantile"]

# At x <= 1/2 each term of the series is less than half of the one before.
_SERIES_TERMS = 60
_NEWTON_STEPS = 30


def symmetric_beta_quantile(probability: NDArray[np.float64], shape: float) -> NDArray[np.float64]:
    """The x below which Beta(shape, shape) falls with the given probability.

    Args:
        probability: any shape, float64, 0 .. 1.
        shape: both parameters of the distribution, above 0.

    Returns:
        float64 of the same shape, 0 .. 1.

    Source: DLMF 8.17.7, the incomplete beta function as x**a times a power series; solved by Newton's method for
    y = x**a, in which the distribution function is nearly a line near 0.
    """
    # I_x(a, a) = 1 - I_(1 - x)(a, a), so the series only runs where it is fast.
    upper = probability > 0.5
    target = np.where(upper, 1.0 - probability, probability)
    scale = math.gamma(shape) ** 2 / math.gamma(2.0 * shape)
    y = np.minimum(target * shape * scale, 0.5**shape)
    for _ in range(_NEWTON_STEPS):
        x = y ** (1.0 / shape)
        slope = (1.0 - x) ** (shape - 1.0) / (shape * scale)
        y = np.clip(y - (y * _series(x, shape) / scale - target) / slope, 0.0, 0.5**shape)
    x = y ** (1.0 / shape)
    return np.asarray(np.where(upper, 1.0 - x, x))


def _series(x: NDArray[np.float64], shape: float) -> NDArray[np.float64]:
    power = np.ones_like(x)
    total = power / shape
    for n in range(1, _SERIES_TERMS):
        power = power * x * (n - shape) / n
        total = total + power / (shape + n)
    return total
