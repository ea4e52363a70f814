"""Statistics of every activation, streamed: memory depends on the network, never on the number of samples.

One pass over the calibration set with hooks on the layers. A histogram starts at the range of the first batch and
doubles when a value falls outside; since ranges are powers of two the counts move exactly, nothing is resampled.
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qdm_calibration.layers import layer_of
from qdm_calibration.rows import in_batches, run_rows
from qdm_deploy.artifacts.calibration_set import CalibrationSet
from qdm_deploy.artifacts.statistics import HISTOGRAM_BINS, ActivationStatistics, TensorStatistics, halved
from qdm_deploy.artifacts.topology import Layer, Topology
from qdm_deploy.errors import CalibrationError
from qdm_deploy.progress import SILENT, Progress

__all__ = ["TensorCollector", "collect_scaled_inputs", "collect_statistics", "timestep_edges"]

# More bins than this would cost memory without telling neighbouring timesteps apart any better.
_MAX_TIMESTEP_BINS = 32


def timestep_edges(timesteps: NDArray[np.int64], num_train_timesteps: int) -> NDArray[np.int64]:
    """Edges [M + 1] of bins over the timestep value: midway between recorded timesteps, from 0 to T.

    Edges between what was recorded make bins independent of the sampler that recorded it. With more than 32 distinct
    timesteps, neighbours share a bin.
    """
    distinct = np.unique(timesteps)
    groups = np.array_split(distinct, min(len(distinct), _MAX_TIMESTEP_BINS))
    inner = [(int(left[-1]) + int(right[0]) + 1) // 2 for left, right in pairwise(groups)]
    return np.array([0, *inner, num_train_timesteps], dtype=np.int64)


class TensorCollector:
    """Streaming statistics of one tensor over M timestep bins and the channel branches ``widths``."""

    def __init__(self, time_bins: int, widths: tuple[int, ...]) -> None:
        """Start empty."""
        channels = sum(widths)
        self.widths = widths
        self.counts = np.zeros((time_bins, len(widths), HISTOGRAM_BINS), dtype=np.int64)
        self.exponents = np.full((time_bins, len(widths)), np.iinfo(np.int64).min, dtype=np.int64)
        self.channel_min = np.full((time_bins, channels), np.inf, dtype=np.float32)
        self.channel_max = np.full((time_bins, channels), -np.inf, dtype=np.float32)

    def add(self, time_bin: int, values: Tensor, channel_axis: int) -> None:
        """Count ``values`` (any shape, channels on ``channel_axis``) into ``time_bin``.

        Raises:
            CalibrationError: a value is NaN or infinite.
        """
        axes = [axis for axis in range(values.ndim) if axis != channel_axis % values.ndim]
        low, high = values.amin(dim=axes).numpy(), values.amax(dim=axes).numpy()
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise CalibrationError("it is NaN or infinite")
        np.minimum(self.channel_min[time_bin], low, out=self.channel_min[time_bin])
        np.maximum(self.channel_max[time_bin], high, out=self.channel_max[time_bin])
        peak = np.maximum(np.abs(low), np.abs(high))
        start = 0
        for branch, (width, part) in enumerate(
            zip(self.widths, values.split_with_sizes(self.widths, dim=channel_axis), strict=True)
        ):
            self._count(time_bin, branch, part, float(peak[start : start + width].max()))
            start += width

    def _count(self, time_bin: int, branch: int, values: Tensor, peak: float) -> None:
        # The range is half open at the top; the nudge keeps an exact power of two inside it. 2**-40 stands for all
        # zeros.
        exponent = int(np.ceil(np.log2(max(peak, 2.0**-40) * (1 + 1e-6))))
        current = int(self.exponents[time_bin, branch])
        if not self.counts[time_bin, branch].any():
            current = exponent
        while current < exponent:
            self.counts[time_bin, branch] = halved(self.counts[time_bin, branch])
            current += 1
        self.exponents[time_bin, branch] = current
        limit = 2.0**current
        counts = torch.histc(values, HISTOGRAM_BINS, -limit, limit)
        self.counts[time_bin, branch] += counts.to(torch.int64).numpy()

    def result(self) -> TensorStatistics:
        """What was collected."""
        return TensorStatistics(self.counts, self.exponents, self.channel_min, self.channel_max)


def collect_statistics(
    network: nn.Module,
    topology: Topology,
    calibration: CalibrationSet,
    num_train_timesteps: int,
    *,
    batch_size: int = 16,
    progress: Progress = SILENT,
) -> ActivationStatistics:
    """Run the calibration set through ``network`` and measure every activation the plan may quantize.

    Args:
        network: takes (sample, timestep, **conditioning).
        topology: the layers and what they share.
        calibration: network inputs with their timesteps.
        num_train_timesteps: T; the timestep bins cover 0 .. T - 1.
        batch_size: rows per forward pass.
        progress: where to report.

    Raises:
        CalibrationError: a layer was never reached, or an activation is NaN or infinite.
    """
    edges = timestep_edges(calibration.timestep, num_train_timesteps)
    bins = len(edges) - 1
    groups = topology.groups()
    inputs = {name: TensorCollector(bins, layers[0].branches) for name, layers in groups.items()}
    convs = [layer for layer in topology.candidates if layer.kind == "conv"]
    outputs = {layer.name: TensorCollector(bins, (layer.out_channels,)) for layer in convs}
    products = {layer.name: TensorCollector(bins, (layer.out_channels,)) for layer in convs if not layer.normalized}
    current = 0  # the timestep bin of the batch in flight; every batch has one

    def record(collector: TensorCollector, what: str, values: Tensor, axis: int) -> None:
        try:
            collector.add(current, values, axis)
        except CalibrationError as error:
            raise CalibrationError(
                f"{what} at timesteps {edges[current]}..{edges[current + 1] - 1}: {error}"
            ) from error

    def on_input(layer: Layer) -> Callable[[nn.Module, Any], None]:
        axis = 1 if layer.kind == "conv" else -1
        return lambda module, args: record(inputs[layer.name], f"the input of {layer.name}", args[0], axis)

    def on_output(layer: Layer) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            record(outputs[layer.name], f"the output of {layer.name}", output, 1)
            if layer.name in products:
                bias = module.bias
                product = output - bias.reshape(1, -1, 1, 1) if isinstance(bias, Tensor) else output
                record(products[layer.name], f"the output of {layer.name}", product, 1)

        return hook

    handles = []
    try:
        for name, layers in groups.items():
            handles.append(layer_of(network, name).register_forward_pre_hook(on_input(layers[0])))
        for layer in convs:
            handles.append(layer_of(network, layer.name).register_forward_hook(on_output(layer)))
        with progress.task("Measuring activations", len(calibration)) as advance:
            for time_bin in _run(network, calibration, edges, batch_size, advance):
                current = time_bin
    finally:
        for handle in handles:
            handle.remove()
    _refuse_unvisited({**inputs, **outputs})
    return ActivationStatistics(
        edges,
        {name: item.result() for name, item in inputs.items()},
        {name: item.result() for name, item in outputs.items()},
        {name: item.result() for name, item in products.items()},
        provenance={"calibration": dict(calibration.provenance), "rows": len(calibration)},
    )


def collect_scaled_inputs(
    network: nn.Module,
    topology: Topology,
    calibration: CalibrationSet,
    edges: NDArray[np.int64],
    inverse_k: Mapping[str, NDArray[np.float32]],
    *,
    batch_size: int = 16,
    progress: Progress = SILENT,
) -> dict[str, TensorStatistics]:
    """Statistics of x / k for the shared inputs that have per-channel factors, one branch each.

    Args:
        network: as for ``collect_statistics``, like what is not explained here.
        topology: the layers and what they share.
        calibration: network inputs with their timesteps.
        edges: [M + 1] timestep bins of the other statistics.
        inverse_k: 1 / k per channel, [C], by input group.
        batch_size: rows per forward pass.
        progress: where to report.

    Raises:
        CalibrationError: an activation is NaN or infinite.
    """
    groups = topology.groups()
    collectors = {name: TensorCollector(len(edges) - 1, (len(factor),)) for name, factor in inverse_k.items()}
    current = 0

    def on_input(name: str) -> Callable[[nn.Module, Any], None]:
        conv = groups[name][0].kind == "conv"
        factor = torch.from_numpy(inverse_k[name]).reshape((1, -1, 1, 1) if conv else (-1,))
        return lambda module, args: collectors[name].add(current, args[0] * factor, 1 if conv else -1)

    handles = [layer_of(network, name).register_forward_pre_hook(on_input(name)) for name in collectors]
    try:
        with progress.task("Measuring scaled activations", len(calibration)) as advance:
            for time_bin in _run(network, calibration, edges, batch_size, advance):
                current = time_bin
    finally:
        for handle in handles:
            handle.remove()
    return {name: collector.result() for name, collector in collectors.items()}


def _run(
    network: nn.Module,
    calibration: CalibrationSet,
    edges: NDArray[np.int64],
    batch_size: int,
    advance: Callable[[int], None],
) -> Iterator[int]:
    """Run the set through the network, each batch within one timestep bin; yields that bin before its batch runs."""
    for time_bin, rows in _batches(calibration.timestep, edges, batch_size):
        yield time_bin
        with torch.inference_mode():
            run_rows(network, calibration, rows)
        advance(len(rows))


def _batches(
    timesteps: NDArray[np.int64], edges: NDArray[np.int64], batch_size: int
) -> Iterator[tuple[int, NDArray[np.int64]]]:
    bin_of_row = np.searchsorted(edges, timesteps, side="right") - 1
    for time_bin in range(len(edges) - 1):
        rows = np.flatnonzero(bin_of_row == time_bin)
        for batch in in_batches(rows, batch_size):
            yield time_bin, batch


def _refuse_unvisited(collectors: dict[str, TensorCollector]) -> None:
    for name, collector in collectors.items():
        empty = np.flatnonzero(collector.counts.sum(axis=(1, 2)) == 0)
        if len(empty):
            raise CalibrationError(
                f"{name} was never reached in {len(empty)} of {len(collector.counts)} timestep bins; "
                "the network skips it for these inputs, so it has no range to calibrate"
            )
