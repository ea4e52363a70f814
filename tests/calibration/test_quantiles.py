"""Quantiles of a streamed histogram against those of the values themselves."""

import numpy as np
import pytest
import torch

from qdm_calibration.statistics import TensorCollector
from qdm_deploy.artifacts.statistics import HISTOGRAM_BINS, Histogram
from qdm_deploy.errors import CalibrationError

LEVELS = (0.0, 0.001, 0.01, 0.25, 0.5, 0.75, 0.99, 0.999, 1.0)


@pytest.mark.parametrize("shape", ["normal", "one-sided", "two clusters", "few values"])
def test_they_lie_within_a_bin_of_the_values_own(shape: str) -> None:
    generator = np.random.default_rng(0)
    values = generator.standard_normal(20_000).astype(np.float32)
    if shape == "one-sided":
        values = values / (1 + np.exp(-values))
    elif shape == "two clusters":
        values = np.where(values > 0, values + 40, values * 0.01 - 3).astype(np.float32)
    elif shape == "few values":
        values = values[:7]
    collector = TensorCollector(1, (1,))
    for batch in np.array_split(values, 3):
        collector.add(0, torch.from_numpy(batch.reshape(-1, 1)), 1)
    histogram = collector.result().histogram(0)
    width = 2.0 ** (histogram.exponent + 1) / HISTOGRAM_BINS
    expected = np.quantile(values.astype(np.float64), LEVELS, method="inverted_cdf")
    found = histogram.quantiles(LEVELS)
    assert np.abs(found - expected).max() <= width * 1.001
    assert (np.diff(found) >= 0).all()


def test_values_lie_evenly_within_their_bin() -> None:
    counts = np.zeros(HISTOGRAM_BINS, np.int64)
    counts[HISTOGRAM_BINS // 2] = 4  # [0, 1) where a bin is 1 wide
    histogram = Histogram(counts, int(np.log2(HISTOGRAM_BINS)) - 1)
    assert histogram.quantiles([0, 0.25, 0.5, 1]).tolist() == [0.0, 0.25, 0.5, 1.0]


def test_no_level_falls_into_an_empty_stretch() -> None:
    counts = np.zeros(HISTOGRAM_BINS, np.int64)
    counts[HISTOGRAM_BINS // 2 - 10], counts[HISTOGRAM_BINS // 2 + 10] = 1, 1
    histogram = Histogram(counts, int(np.log2(HISTOGRAM_BINS)) - 1)
    assert histogram.quantiles([0.5, 0.75]).tolist() == [-9.0, 10.5]


def test_an_empty_histogram_has_none() -> None:
    with pytest.raises(CalibrationError, match="a histogram without a value has no quantiles"):
        Histogram(np.zeros(HISTOGRAM_BINS, np.int64), 0).quantiles([0.5])
