"""Grids that only the papers' tables need: other measures of a range's error, and activations of fewer bits.

A plan of the product says which tensors have a grid and what is folded into it; here the numbers of each grid are
decided anew. Such plans are simulated; with 8 bits they can be emitted too.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import nn

from qdm_calibration.layers import layer_of
from qdm_calibration.phase_scales import scale_for_phases
from qdm_calibration.ranges import (
    ActivationScale,
    grid_points,
    quantize_weight,
    search_scale,
    search_weight_scale,
    weight_scale,
    weight_sqnr_db,
)
from qdm_deploy.artifacts.plan import LayerPlan, QuantizationPlan
from qdm_deploy.artifacts.statistics import HISTOGRAM_BINS, ActivationStatistics, Histogram

__all__ = ["MEASURES", "Measure", "levels_of", "narrowed", "regridded", "searched_grid", "searched_weights"]

Measure = Literal["mse", "l1", "cosine", "kl"]
MEASURES: tuple[Measure, ...] = ("mse", "l1", "cosine", "kl")
_POWERS = {"mse": 2.0, "l1": 1.0}

Array = NDArray[np.float64]
Seen = Sequence[tuple[Histogram, float]]


def levels_of(bits: int) -> tuple[int, int]:
    """The smallest and the largest activation code of that many bits."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def regridded(
    network: nn.Module,
    plan: QuantizationPlan,
    statistics: ActivationStatistics,
    measure: Measure,
    *,
    zero_offset: bool = True,
    bits: int = 8,
    upsample_phases: bool = True,
) -> QuantizationPlan:
    """The plan with scales and offsets by another measure; its factors k and gains r stay.

    Args:
        network: holds the weights.
        plan: of the same statistics; its k are of whole branches.
        statistics: ranges of every activation.
        measure: what a grid's error is; weights have the same but for "kl", where they use their largest magnitude.
        zero_offset: whether z may differ from 0.
        bits: of an activation code; other than 8 are for ``narrowed`` simulations.
        upsample_phases: as in ``PlanOptions``.
    """
    bin_of = np.searchsorted(plan.timestep_edges, statistics.timestep_edges[:-1], side="right") - 1
    grids: dict[str, ActivationScale] = {}
    changed = []
    for layer in plan.layers:
        if layer.precision != "int8":
            changed.append(layer)
            continue
        group = layer.layer.input_group
        if group not in grids:
            seen = _seen(layer, statistics, bin_of)
            grids[group] = searched_grid(seen, measure, zero_offset=zero_offset, levels=levels_of(bits))
        weight = layer_of(network, layer.name).get_parameter("weight").detach().numpy()
        if layer.inverse_k is not None:
            weight = weight / layer.inverse_k.reshape(1, -1, *([1] * (weight.ndim - 2)))
        scale = searched_weights(weight, measure, layer.weight_bits)
        if layer.layer.upsampled and upsample_phases:
            scale, _ = scale_for_phases(weight, scale, layer.weight_bits)
        codes = quantize_weight(weight, scale, layer.weight_bits)
        changed.append(
            dataclasses.replace(
                layer,
                scale=grids[group].scale,
                zero_offset=grids[group].zero_offset,
                weight_codes=codes,
                weight_scale=scale,
                weight_sqnr_db=weight_sqnr_db(weight, codes, scale),
            )
        )
    return dataclasses.replace(plan, layers=tuple(changed))


def narrowed(simulation: nn.Module, bits: int) -> nn.Module:
    """The simulation, in place, with activation codes of fewer bits."""
    for module in simulation.modules():
        if hasattr(module, "levels"):
            module.levels = levels_of(bits)
    return simulation


def _seen(layer: LayerPlan, statistics: ActivationStatistics, bin_of: NDArray[np.int64]) -> Seen:
    """What the grid of a layer's input sees: the histogram of each gain bin and branch, and its factor k r."""
    tensor, widths = statistics.inputs[layer.layer.input_group], layer.layer.branches
    starts = np.cumsum([0, *widths[:-1]])
    inverse_k = np.ones(sum(widths), np.float32) if layer.inverse_k is None else layer.inverse_k
    inverse_r = np.ones(1) if layer.inverse_r is None else layer.inverse_r
    gain_of = np.zeros_like(bin_of) if layer.inverse_r is None else bin_of
    seen = []
    for j, gain in enumerate(inverse_r):
        for branch, start in enumerate(starts):
            first, *others = np.flatnonzero(gain_of == j).tolist()
            merged = tensor.histogram(first, branch)
            for other in others:
                merged = merged + tensor.histogram(other, branch)
            seen.append((merged, 1.0 / float(inverse_k[start]) * (1.0 / float(gain))))
    return seen


def searched_grid(seen: Seen, measure: Measure, *, zero_offset: bool, levels: tuple[int, int]) -> ActivationScale:
    """The grid of the smallest error: mean |x - x_hat|**p ("mse": p = 2, "l1": p = 1), 1 - cos ("cosine"), or "kl".

    "kl" is the divergence of what the grid leaves of the distribution, in nats, as in entropy calibration.
    """
    points, counts, factors = grid_points(seen)
    loss = _loss(points, counts, factors, measure, levels)
    return search_scale(float(points[0]), float(points[-1]), loss, zero_offset=zero_offset, levels=levels)


def searched_weights(weight: NDArray[np.float32], measure: Measure, bits: int = 8) -> NDArray[np.float32]:
    """w per output channel, [O]; "kl" uses the largest magnitude: entropy calibration is for activations."""
    if measure == "kl":
        return weight_scale(weight, "minmax", bits)

    def errors(values: Array, back: Array) -> Array:
        if measure != "cosine":
            found: Array = (np.abs(values - back) ** _POWERS[measure]).sum(axis=1)
            return found
        norms = np.sqrt((values**2).sum(axis=1) * (back**2).sum(axis=1))
        cosine: Array = np.divide((values * back).sum(1), norms, out=np.zeros(len(values)), where=norms > 0)
        return 1 - cosine

    return search_weight_scale(weight, errors, bits)


def _loss(
    points: Array, counts: Array, factors: Array, measure: Measure, levels: tuple[int, int]
) -> Callable[[float, int], float]:
    if measure == "kl":
        return _divergence(points, counts, levels)
    power = _POWERS.get(measure, 2.0)
    weights = counts * factors**power / counts.sum()

    def back(scale: float, offset: int) -> Array:
        values: Array = (np.clip(np.rint(points / scale) - offset, *levels) + offset) * scale
        return values

    if measure == "cosine":
        weighted = weights * points
        energy = float((weighted * points).sum())

        def turned(scale: float, offset: int) -> float:
            values = back(scale, offset)
            norm = float(np.sqrt(energy * (weights * values**2).sum()))
            return 1 - float((weighted * values).sum()) / norm if norm > 0 else 1.0

        return turned
    return lambda scale, offset: float((weights * np.abs(points - back(scale, offset)) ** power).sum())


def _divergence(points: Array, counts: Array, levels: tuple[int, int]) -> Callable[[float, int], float]:
    """KL(P || Q) in nats of a grid, as entropy calibration counts it (Migacz 2017, "8-bit inference with TensorRT").

    P is the histogram of what the grid sees, with the tails that the grid clips moved into its outermost bins. Q is
    the same histogram without those tails, each code's mass spread evenly over the code's filled bins.
    """
    # All points in bins of one width: interleaved histograms of different factors would not be even inside a code.
    limit = 2.0 ** np.ceil(np.log2(np.abs(points).max() * (1 + 1e-6)))
    index = np.floor((points / limit + 1) * (HISTOGRAM_BINS // 2)).astype(np.int64)
    mass = np.bincount(index, weights=counts, minlength=HISTOGRAM_BINS)
    filled = np.flatnonzero(mass)
    mass, centers = mass[filled] / mass.sum(), ((filled + 0.5) / (HISTOGRAM_BINS // 2) - 1) * limit

    def measured(scale: float, offset: int) -> float:
        codes = np.rint(centers / scale).astype(np.int64) - offset
        first, last = np.searchsorted(codes, levels[0]), np.searchsorted(codes, levels[1], side="right")
        if first == last:
            return np.inf
        kept = mass[first:last].copy()
        code = codes[first:last] - levels[0]
        sums, bins = np.bincount(code, weights=kept), np.bincount(code)
        q = (sums[code] / bins[code]) / kept.sum()
        kept[0] += mass[:first].sum()
        kept[-1] += mass[last:].sum()
        return float((kept * np.log(kept / q)).sum())

    return measured
