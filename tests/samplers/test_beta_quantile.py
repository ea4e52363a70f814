"""The beta quantiles against scipy."""

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from qdm_deploy.samplers.beta_quantile import symmetric_beta_quantile


@pytest.mark.parametrize("shape", [0.5, 0.6, 0.9, 1.0, 2.0])
def test_quantiles_are_those_of_scipy(shape: float) -> None:
    probability = np.concatenate([np.linspace(0, 1, 1001), 10.0 ** -np.arange(2, 12), 1 - 10.0 ** -np.arange(2, 12)])
    expected = scipy.stats.beta.ppf(probability, shape, shape)
    np.testing.assert_allclose(symmetric_beta_quantile(probability, shape), expected, rtol=1e-10, atol=1e-14)


@settings(max_examples=40, deadline=None)
@given(st.floats(0.0, 1.0), st.floats(0.3, 3.0))
def test_the_distribution_function_undoes_the_quantile(probability: float, shape: float) -> None:
    quantile = symmetric_beta_quantile(np.array([probability]), shape)
    assert scipy.stats.beta.cdf(quantile, shape, shape) == pytest.approx(probability, abs=1e-9)


def test_the_arcsine_distribution_by_hand() -> None:
    probability = np.linspace(0, 1, 51)
    np.testing.assert_allclose(
        symmetric_beta_quantile(probability, 0.5), np.sin(np.pi * probability / 2) ** 2, atol=1e-14
    )
