"""What calibration saw: ranges of every activation, per timestep bin.

Histograms have power-of-two ranges, so that two of them can be added without interpolation whatever their ranges: the
finer one's bins fall exactly into the coarser one's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.artifacts.record import read_record, write_record
from qdm_deploy.errors import CalibrationError

__all__ = ["HISTOGRAM_BINS", "ActivationStatistics", "Histogram", "TensorStatistics"]

_KIND = "qdm-activation-statistics"
_VERSION = 1
HISTOGRAM_BINS = 4096


@dataclass(frozen=True)
class Histogram:
    """Counts of values in ``HISTOGRAM_BINS`` equal bins over [-2**exponent, 2**exponent].

    Attributes:
        counts: [HISTOGRAM_BINS] int64.
        exponent: log2 of the range.
    """

    counts: NDArray[np.int64]
    exponent: int

    @property
    def centers(self) -> NDArray[np.float64]:
        """Middle of each bin, [HISTOGRAM_BINS]."""
        width = 2.0 ** (self.exponent + 1) / HISTOGRAM_BINS
        return (np.arange(HISTOGRAM_BINS, dtype=np.float64) - HISTOGRAM_BINS / 2 + 0.5) * width

    def quantiles(self, levels: Sequence[float]) -> NDArray[np.float64]:
        """Values below which the shares ``levels``, each in [0, 1], of all counted values lie, [len(levels)].

        Values are taken to lie evenly within their bin, so a quantile is off by at most a bin's width,
        2**(exponent + 1) / HISTOGRAM_BINS, where values lie there at all.

        Raises:
            CalibrationError: nothing was counted.
        """
        occupied = np.flatnonzero(self.counts)
        if not len(occupied):
            raise CalibrationError("a histogram without a value has no quantiles; calibrate again")
        width = 2.0 ** (self.exponent + 1) / HISTOGRAM_BINS
        counts = self.counts[occupied].astype(np.float64)
        above = np.cumsum(counts)
        wanted = np.asarray(levels, dtype=np.float64) * above[-1]
        # Empty bins are left out: a level that falls between two clusters belongs to an end of one of them.
        place = np.minimum(np.searchsorted(above, wanted), len(occupied) - 1)
        inside = (wanted - (above[place] - counts[place])) / counts[place]
        found: NDArray[np.float64] = (occupied[place] - HISTOGRAM_BINS / 2 + np.clip(inside, 0.0, 1.0)) * width
        return found

    def widened(self, exponent: int) -> "Histogram":
        """The same counts over a range 2**exponent at least as wide; exact."""
        counts = self.counts
        for _ in range(exponent - self.exponent):
            counts = halved(counts)
        return Histogram(counts, exponent)

    def __add__(self, other: "Histogram") -> "Histogram":
        """Counts of both, over the wider range of the two."""
        exponent = max(self.exponent, other.exponent)
        return Histogram(self.widened(exponent).counts + other.widened(exponent).counts, exponent)


def halved(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Counts over twice the range: pairs of bins merge into the middle half."""
    quarter = HISTOGRAM_BINS // 4
    wide = np.zeros_like(counts)
    wide[..., quarter : 3 * quarter] = counts.reshape(*counts.shape[:-1], -1, 2).sum(-1)
    return wide


@dataclass(frozen=True)
class TensorStatistics:
    """One activation tensor, per timestep bin m and per branch g (one branch where it is not a skip concatenation).

    Attributes:
        counts: histograms, [M, G, HISTOGRAM_BINS] int64.
        exponents: their ranges, [M, G] int64.
        channel_min, channel_max: smallest and largest value of each channel, [M, C] float32.
    """

    counts: NDArray[np.int64]
    exponents: NDArray[np.int64]
    channel_min: NDArray[np.float32]
    channel_max: NDArray[np.float32]

    def histogram(self, time_bin: int, branch: int = 0) -> Histogram:
        """The histogram of one timestep bin and branch."""
        return Histogram(self.counts[time_bin, branch], int(self.exponents[time_bin, branch]))

    @property
    def branches(self) -> int:
        """Number of skip-concatenation branches."""
        return int(self.counts.shape[1])


@dataclass(frozen=True)
class ActivationStatistics:
    """Statistics of every tensor a plan needs, over one set of timestep bins.

    Attributes:
        timestep_edges: [M + 1] int64; bin m covers timesteps edges[m] .. edges[m + 1] - 1, from 0 to T.
        inputs: statistics of each shared input tensor, by its input group.
        outputs: statistics of each convolution's output, by layer; with the bias.
        products: the same without the bias, for the layers that may get a step-aware gain.
        provenance: what they were made from (JSON values).
    """

    timestep_edges: NDArray[np.int64]
    inputs: Mapping[str, TensorStatistics]
    outputs: Mapping[str, TensorStatistics]
    products: Mapping[str, TensorStatistics]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write everything to one safetensors file."""
        arrays: dict[str, NDArray[Any]] = {"timestep_edges": self.timestep_edges}
        for section in ("inputs", "outputs", "products"):
            for name, tensor in getattr(self, section).items():
                arrays[f"{section}/{name}/counts"] = tensor.counts
                arrays[f"{section}/{name}/exponents"] = tensor.exponents
                arrays[f"{section}/{name}/channel_min"] = tensor.channel_min
                arrays[f"{section}/{name}/channel_max"] = tensor.channel_max
        write_record(path, kind=_KIND, version=_VERSION, document={"provenance": dict(self.provenance)}, arrays=arrays)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read statistics that ``save`` wrote.

        Raises:
            InputError: the file holds something else, is truncated, or is newer than this version.
            CalibrationError: a part of the statistics is missing, or one is not known.
        """
        document, arrays = read_record(path, kind=_KIND, version=_VERSION)
        sections: dict[str, dict[str, dict[str, NDArray[Any]]]] = {"inputs": {}, "outputs": {}, "products": {}}
        provenance = document.get("provenance")
        try:
            edges = arrays.pop("timestep_edges")
            for key, value in arrays.items():
                section, name, part = key.split("/")
                sections[section].setdefault(name, {})[part] = value
            tensors = {
                section: {name: TensorStatistics(**parts) for name, parts in found.items()}
                for section, found in sections.items()
            }
        except (KeyError, TypeError, ValueError) as error:
            raise CalibrationError(
                f"{path} is not a whole set of activation statistics ({error}); make it again"
            ) from error
        if not isinstance(provenance, dict):
            raise CalibrationError(f"{path} is not a whole set of activation statistics (no provenance); make it again")
        return cls(edges, **tensors, provenance=provenance)
