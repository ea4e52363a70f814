"""The grids that outputs of convolutions are rounded to on ONNX Runtime."""

from typing import Any

import numpy as np
import pytest

from qdm_calibration.plan import output_grid
from qdm_deploy.artifacts.statistics import HISTOGRAM_BINS, ActivationStatistics, TensorStatistics
from qdm_deploy.artifacts.topology import Layer
from tests.recipes import recipe_of

EDGES = np.array([0, 500, 1000])
BIN_OF = np.array([0, 0])
LOW = -np.arange(16, dtype=np.float32)
HIGH = np.full(16, 2.0, dtype=np.float32)
HIGH[15] = LOW[15] = 0.0  # a channel that never moves


def conv(**changes: Any) -> Layer:
    return Layer("conv", "conv", (16, 16, 3, 3), "conv", (16,), False, (1, 1), (1, 1, 1, 1), (8, 8), **changes)


def statistics() -> ActivationStatistics:
    """Channels from LOW to HIGH in the second timestep bin, half of that in the first; the histogram is flat."""
    counts = np.zeros((2, 1, HISTOGRAM_BINS), dtype=np.int64)
    counts[:, :, HISTOGRAM_BINS // 4 : 3 * HISTOGRAM_BINS // 4] = 1  # -8 to 8 of a range of 16
    tensor = TensorStatistics(counts, np.full((2, 1), 4), np.stack([LOW / 2, LOW]), np.stack([HIGH / 2, HIGH]))
    return ActivationStatistics(EDGES, {}, {"conv": tensor}, {"conv": tensor})


def grid(layer: Layer, inverse_r: Any = None, **options: Any) -> tuple[Any, Any]:
    return output_grid(layer, inverse_r, statistics(), BIN_OF, recipe_of(ranges="minmax", **options).layer(layer.name))


def test_before_a_normalization_each_channel_has_its_own() -> None:
    scale, zero_point = grid(conv(feeds_norm=True))
    span = (HIGH - LOW)[:15] / 255
    np.testing.assert_allclose(scale[:15], span, rtol=1e-6)
    np.testing.assert_array_equal(zero_point[:15], np.rint(-LOW[:15] / span))
    assert 0 < scale[15] < 1e-3
    assert (scale.dtype, zero_point.dtype) == (np.float32, np.uint8)


def test_without_offsets_zero_is_in_the_middle() -> None:
    scale, zero_point = grid(conv(feeds_norm=True), zero_offset=False)
    np.testing.assert_allclose(scale[:15], np.maximum(-LOW, HIGH)[:15] / 127, rtol=1e-6)
    assert set(zero_point.tolist()) == {128}


@pytest.mark.parametrize("inverse_r", [None, np.array([1.0], dtype=np.float32)])
def test_elsewhere_all_channels_share_one(inverse_r: Any) -> None:
    scale, zero_point = grid(conv(feeds_norm=inverse_r is not None), inverse_r)
    assert scale == pytest.approx([16 / 255] * 16, rel=2e-3)
    assert set(zero_point.tolist()) <= {127, 128}


def test_matrix_products_have_none() -> None:
    layer = Layer("linear", "linear", (16, 16), "linear", (16,), False, feeds_norm=True)
    assert grid(layer) == (None, None)
