"""Histograms that grow without losing a count, and what the collectors refuse."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

from qdm_calibration.statistics import TensorCollector, collect_statistics, timestep_edges
from qdm_deploy.artifacts.calibration_set import CalibrationSet
from qdm_deploy.artifacts.record import write_record
from qdm_deploy.artifacts.statistics import (
    HISTOGRAM_BINS,
    ActivationStatistics,
    Histogram,
    TensorStatistics,
    halved,
)
from qdm_deploy.artifacts.topology import Layer, Topology
from qdm_deploy.errors import CalibrationError, InputError

Array = NDArray[Any]


def reference(values: Array, exponent: int) -> Array:
    return np.histogram(values, HISTOGRAM_BINS, (-(2.0**exponent), 2.0**exponent))[0]


def collected(batches: list[Array]) -> Histogram:
    collector = TensorCollector(1, (1,))
    for batch in batches:
        collector.add(0, torch.from_numpy(batch.reshape(-1, 1)), 1)
    return collector.result().histogram(0)


# ----------------------------------------------------------------------------------------------------------- histograms


@given(st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(1, 50), st.integers(-4, 4)), min_size=1, max_size=6))
def test_growth_is_exact_whatever_the_order_and_the_ranges(parts: list[tuple[int, int, int]]) -> None:
    # Values in the middle of the bins of their own batch's range: at a bin's edge, and only there, the bin that torch
    # computes in float32 may be the neighbour of numpy's.
    batches = []
    for seed, size, log_range in parts:
        integers = np.random.default_rng(seed).integers(-HISTOGRAM_BINS // 2, HISTOGRAM_BINS // 2, size)
        batches.append(((integers + 0.5) * 2.0 ** (log_range + 1) / HISTOGRAM_BINS).astype(np.float32))
    values = np.concatenate(batches)
    histogram = collected(batches)
    assert np.abs(values).max() <= 2.0**histogram.exponent
    assert histogram.counts.sum() == values.size
    np.testing.assert_array_equal(histogram.counts, reference(values.astype(np.float64), histogram.exponent))
    backwards = collected(batches[::-1])
    assert backwards.exponent == histogram.exponent
    np.testing.assert_array_equal(backwards.counts, histogram.counts)


def test_the_range_is_the_smallest_power_of_two_that_holds_the_data() -> None:
    assert collected([np.float32([0.3])]).exponent == -1
    assert collected([np.float32([-3.9])]).exponent == 2
    # A value on the edge would fall out of the half-open top bin, so it goes to the next range.
    assert collected([np.float32([2.0])]).exponent == 2
    assert collected([np.float32([0.0, 0.0])]).exponent == -39


@pytest.mark.parametrize("peak", [0.5, 1.0, 4.0, 0.75, 1 - 2**-24])
def test_no_count_is_lost_at_the_edges(peak: float) -> None:
    assert collected([np.float32([peak, -peak, 0.0])]).counts.sum() == 3


def test_an_early_batch_of_zeros_does_not_fix_the_range() -> None:
    histogram = collected([np.zeros(5, np.float32), np.float32([3.0, -1.0])])
    assert histogram.exponent == 2
    assert histogram.counts.sum() == 7
    assert histogram.counts[HISTOGRAM_BINS // 2] + histogram.counts[HISTOGRAM_BINS // 2 - 1] == 5


def test_widening_by_hand() -> None:
    counts = np.zeros(HISTOGRAM_BINS, dtype=np.int64)
    counts[[0, 1, 2, -1]] = [1, 2, 4, 8]
    wide = halved(counts)
    quarter = HISTOGRAM_BINS // 4
    assert wide[quarter] == 3  # bins 0 and 1
    assert wide[quarter + 1] == 4
    assert wide[3 * quarter - 1] == 8
    assert wide.sum() == 15


@given(st.integers(-6, 6), st.integers(-6, 6), st.integers(0, 2**32 - 1))
def test_addition_is_the_histogram_of_both(first: int, second: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    parts = [rng.uniform(-(2.0**e), 2.0**e, 200) for e in (first, second)]
    left, right = (Histogram(reference(part, e), e) for part, e in zip(parts, (first, second), strict=True))
    total, swapped = left + right, right + left
    assert total.exponent == max(first, second)
    np.testing.assert_array_equal(total.counts, reference(np.concatenate(parts), max(first, second)))
    np.testing.assert_array_equal(total.counts, swapped.counts)


def test_centers_are_the_middles_of_the_bins() -> None:
    edges = np.histogram_bin_edges([], HISTOGRAM_BINS, (-8.0, 8.0))
    np.testing.assert_allclose(Histogram(np.zeros(HISTOGRAM_BINS), 3).centers, (edges[1:] + edges[:-1]) / 2, atol=1e-12)


# ----------------------------------------------------------------------------------------------------------- collectors


@pytest.mark.parametrize(("shape", "axis"), [((5, 7, 3, 2), 1), ((5, 4, 7), -1), ((6, 7), -1)])
def test_channel_extremes_and_branches(shape: tuple[int, ...], axis: int) -> None:
    rng = np.random.default_rng(0)
    collector = TensorCollector(3, (4, 3))
    widen = np.arange(1, 8).reshape(7, *[1] * (len(shape) - 2)) if axis == 1 else np.arange(1, 8)
    parts = [(rng.normal(size=shape) * widen).astype(np.float32) for _ in range(2)]
    for part in parts:
        collector.add(1, torch.from_numpy(part), axis)
    result = collector.result()
    flat = np.concatenate([np.moveaxis(part, axis, 0).reshape(7, -1) for part in parts], axis=1)
    np.testing.assert_array_equal(result.channel_min[1], flat.min(axis=1))
    np.testing.assert_array_equal(result.channel_max[1], flat.max(axis=1))
    assert np.isinf(result.channel_min[[0, 2]]).all()
    assert result.branches == 2
    for branch, channels in enumerate((flat[:4], flat[4:])):
        histogram = result.histogram(1, branch)
        assert histogram.exponent == np.ceil(np.log2(np.abs(channels).max()))
        np.testing.assert_array_equal(histogram.counts, reference(channels.astype(np.float64), histogram.exponent))
    assert result.counts[[0, 2]].sum() == 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_collector_refuses_nan_and_infinity(value: float) -> None:
    values = torch.ones(2, 3)
    values[1, 2] = value
    with pytest.raises(CalibrationError, match="NaN or infinite"):
        TensorCollector(1, (3,)).add(0, values, 1)


def test_a_collector_does_not_grow() -> None:
    def size_after(batches: int) -> int:
        collector = TensorCollector(4, (8, 8))
        for _ in range(batches):
            collector.add(0, torch.randn(2, 16, 4, 4), 1)
        return sum(value.nbytes for value in vars(collector).values() if isinstance(value, np.ndarray))

    assert size_after(2) == size_after(16)


@pytest.mark.parametrize(
    ("timesteps", "edges"),
    [
        ([900, 500, 100], [0, 300, 700, 1000]),
        ([0, 1], [0, 1, 1000]),
        ([999], [0, 1000]),
        ([10, 10, 13], [0, 12, 1000]),
    ],
)
def test_edges_lie_midway_between_recorded_timesteps(timesteps: list[int], edges: list[int]) -> None:
    assert timestep_edges(np.array(timesteps), 1000).tolist() == edges


@given(st.sets(st.integers(0, 999), min_size=1, max_size=120))
def test_bins_tell_all_timesteps_apart_up_to_32(timesteps: set[int]) -> None:
    recorded = np.array(sorted(timesteps))
    edges = timestep_edges(recorded, 1000)
    assert (np.diff(edges) > 0).all()
    assert (edges[0], edges[-1]) == (0, 1000)
    bins = np.searchsorted(edges, recorded, side="right") - 1
    sizes = np.bincount(bins, minlength=len(edges) - 1)
    assert len(sizes) == min(len(recorded), 32)
    assert sizes.min() >= 1
    assert sizes.max() - sizes.min() <= 1


# ------------------------------------------------------------------------------------------------------ a small network


class Toy(nn.Module):
    """conv (normalized), then shortcut, then linear, at known multiples of the sample."""

    def __init__(self, *, factor: float = 1.0, skip: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.unet = nn.Module()
        self.unet.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.unet.shortcut = nn.Conv2d(4, 4, 1, bias=False)
        self.unet.linear = nn.Linear(4, 4)
        self.factor, self.skip = factor, skip

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = sample * timestep.reshape(-1, 1, 1, 1)
        y = self.unet.conv(x)
        if not self.skip or int(timestep[0]) > 500:
            y = y + self.unet.shortcut(x * self.factor)
        return y + self.unet.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def layer(name: str, kind: Any = "conv", **changes: Any) -> Layer:
    shape = (4, 4) if kind == "linear" else (4, 4, 3, 3)
    values = {"input_group": name, "branches": (4,), "normalized": False, "weight_shape": shape, **changes}
    return Layer(name, kind, **values)


TOPOLOGY = Topology((layer("conv", branches=(3, 1), normalized=True), layer("shortcut"), layer("linear", "linear")))


def calibration(rows: int = 6, timesteps: tuple[int, ...] = (900, 100)) -> CalibrationSet:
    rng = np.random.default_rng(0)
    steps = np.arange(rows) % len(timesteps)
    return CalibrationSet(
        rng.normal(size=(rows, 4, 5, 5)).astype(np.float32), np.array(timesteps)[steps], np.arange(rows), steps,
        provenance={"model": "toy"},
    )  # fmt: skip


def test_every_tensor_is_measured_in_the_bin_of_its_timestep() -> None:
    network, data = Toy(factor=2.0), calibration()
    statistics = collect_statistics(network, TOPOLOGY, data, 1000, batch_size=2)
    assert statistics.timestep_edges.tolist() == [0, 500, 1000]
    assert statistics.inputs.keys() == {"conv", "shortcut", "linear"}
    assert statistics.outputs.keys() == {"conv", "shortcut"}  # convolutions only
    assert statistics.products.keys() == {"shortcut"}  # and without bias, those that may get a gain
    for time_bin, t in enumerate((100, 900)):
        x = torch.from_numpy(data.sample[data.timestep == t]) * t
        with torch.inference_mode():
            expected = {
                ("inputs", "conv"): x, ("inputs", "shortcut"): 2 * x, ("inputs", "linear"): x,
                ("outputs", "conv"): network.unet.conv(x), ("outputs", "shortcut"): network.unet.shortcut(2 * x),
            }  # fmt: skip
        for (section, name), values in expected.items():
            found = getattr(statistics, section)[name]
            np.testing.assert_allclose(found.channel_max[time_bin], values.amax((0, 2, 3)).numpy(), rtol=1e-5)
            np.testing.assert_allclose(found.channel_min[time_bin], values.amin((0, 2, 3)).numpy(), rtol=1e-5)
            assert found.counts[time_bin].sum() == values.numel()
    assert statistics.inputs["conv"].branches == 2
    assert statistics.inputs["conv"].counts[0].sum(axis=1).tolist() == [3 * 75, 75]
    assert statistics.provenance == {"calibration": {"model": "toy"}, "rows": 6}


def test_products_leave_out_the_bias() -> None:
    network = Toy()
    with torch.no_grad():
        network.unet.conv.bias.copy_(torch.tensor([1.0, -2.0, 3.0, 50.0]))
    topology = Topology((layer("conv"),))
    statistics = collect_statistics(network, topology, calibration(), 1000)
    difference = statistics.outputs["conv"].channel_max - statistics.products["conv"].channel_max
    np.testing.assert_allclose(difference, [[1, -2, 3, 50]] * 2, atol=1e-3)  # of values up to 2000


def test_the_batch_size_changes_nothing() -> None:
    first, second = (collect_statistics(Toy(), TOPOLOGY, calibration(), 1000, batch_size=size) for size in (1, 6))
    for name in first.inputs:
        np.testing.assert_array_equal(first.inputs[name].counts, second.inputs[name].counts)
        np.testing.assert_array_equal(first.inputs[name].channel_max, second.inputs[name].channel_max)


def test_hooks_are_gone_afterwards_even_after_an_error() -> None:
    network = Toy(factor=float("nan"))
    with pytest.raises(CalibrationError):
        collect_statistics(network, TOPOLOGY, calibration(), 1000)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_nan_is_refused_with_layer_and_timesteps(factor: float) -> None:
    with pytest.raises(CalibrationError, match=r"the input of shortcut at timesteps 0\.\.499: it is NaN or infinite"):
        collect_statistics(Toy(factor=factor), TOPOLOGY, calibration(), 1000)


def test_an_output_that_overflows_is_refused() -> None:
    network = Toy()
    with torch.no_grad():
        network.unet.conv.weight.fill_(1e37)
    with pytest.raises(CalibrationError, match=r"the output of conv at timesteps 0\.\.499: it is NaN or infinite"):
        collect_statistics(network, TOPOLOGY, calibration(), 1000)


def test_a_layer_that_is_never_reached_is_refused() -> None:
    with pytest.raises(CalibrationError, match="shortcut was never reached in 1 of 2 timestep bins"):
        collect_statistics(Toy(skip=True), TOPOLOGY, calibration(), 1000)


def test_statistics_of_a_real_network_name_its_groups(tiny: Any) -> None:
    statistics, topology = tiny.statistics("labels"), tiny.topology("labels")
    assert list(statistics.inputs) == list(topology.groups())
    assert len(statistics.timestep_edges) == 12 + 1
    for name, layers in topology.groups().items():
        found = statistics.inputs[name]
        assert found.branches == len(layers[0].branches)
        assert (found.channel_min <= found.channel_max).all()
        elements = found.counts.sum(axis=2)
        # 4 guided trajectories: 8 rows at each of 12 steps; each channel of a branch has equally many values.
        np.testing.assert_array_equal(
            elements // np.array(layers[0].branches), np.full_like(elements, elements[0, 0] // layers[0].branches[0])
        )
        assert elements[0, 0] % (8 * layers[0].branches[0]) == 0


# ------------------------------------------------------------------------------------------------------ the saved value


def test_save_and_load_keep_every_bit(tiny: Any, tmp_path: Path) -> None:
    statistics = tiny.statistics("labels")
    statistics.save(tmp_path / "s.safetensors")
    loaded = ActivationStatistics.load(tmp_path / "s.safetensors")
    np.testing.assert_array_equal(loaded.timestep_edges, statistics.timestep_edges)
    assert loaded.provenance == statistics.provenance
    for section in ("inputs", "outputs", "products"):
        mine, theirs = getattr(statistics, section), getattr(loaded, section)
        assert mine.keys() == theirs.keys()
        for name, tensor in mine.items():
            for part, values in vars(tensor).items():
                np.testing.assert_array_equal(getattr(theirs[name], part), values)


def test_a_record_without_edges_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    write_record(
        path,
        kind="qdm-activation-statistics",
        version=1,
        document={"provenance": {}},
        arrays={"inputs/a/counts": np.zeros(1)},
    )
    with pytest.raises(CalibrationError, match=r"s\.safetensors is not a whole set of activation statistics"):
        ActivationStatistics.load(path)


def test_a_record_without_provenance_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    write_record(
        path, kind="qdm-activation-statistics", version=1, document={}, arrays={"timestep_edges": np.array([0, 1])}
    )
    with pytest.raises(
        CalibrationError, match=r"s\.safetensors is not a whole set of activation statistics \(no provenance"
    ):
        ActivationStatistics.load(path)


@pytest.mark.parametrize("key", ["inputs/a/surprise", "elsewhere/a/counts", "counts", "inputs/a/b/c"])
def test_a_record_with_unknown_parts_is_refused(tmp_path: Path, key: str) -> None:
    path = tmp_path / "s.safetensors"
    arrays = {"timestep_edges": np.array([0, 1000]), key: np.zeros(1)}
    write_record(path, kind="qdm-activation-statistics", version=1, document={"provenance": {}}, arrays=arrays)
    with pytest.raises(CalibrationError, match=r"s\.safetensors is not a whole set of activation statistics"):
        ActivationStatistics.load(path)


def test_a_record_with_half_a_tensor_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    arrays = {"timestep_edges": np.array([0, 1000]), "inputs/a/counts": np.zeros((1, 1, HISTOGRAM_BINS), np.int64)}
    write_record(path, kind="qdm-activation-statistics", version=1, document={"provenance": {}}, arrays=arrays)
    with pytest.raises(CalibrationError, match=r"s\.safetensors is not a whole set of activation statistics"):
        ActivationStatistics.load(path)


def test_a_calibration_set_is_not_taken_for_statistics(tiny: Any, tmp_path: Path) -> None:
    tiny.calibration("variance").save(tmp_path / "set.safetensors")
    with pytest.raises(InputError, match="qdm-calibration-set"):
        ActivationStatistics.load(tmp_path / "set.safetensors")


def test_tensor_statistics_give_their_histograms() -> None:
    counts = np.arange(2 * 3 * HISTOGRAM_BINS).reshape(2, 3, HISTOGRAM_BINS)
    tensor = TensorStatistics(counts, np.arange(6).reshape(2, 3), np.zeros((2, 4)), np.ones((2, 4)))
    histogram = tensor.histogram(1, 2)
    assert histogram.exponent == 5
    assert histogram.counts[0] == 5 * HISTOGRAM_BINS
