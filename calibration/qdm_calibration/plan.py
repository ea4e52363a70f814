"""From statistics to decisions.

Each factor of the separable scale is decided on its own and says why: the branch factors k where a skip concatenation
joins tensors of different range, the step gains r where nothing normalizes an input whose range moves with the
timestep, then one scale s and one offset z for what is left.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from qdm_calibration.channel_factors import ChannelFactors
from qdm_calibration.layers import layer_of
from qdm_calibration.phase_scales import scale_for_phases
from qdm_calibration.ranges import (
    ActivationScale,
    activation_scale,
    quantize_weight,
    weight_scale,
    weight_sqnr_db,
)
from qdm_calibration.step_bins import GainInput, StepBins, choose_step_bins
from qdm_deploy.artifacts.plan import ACTIVATION_LEVELS, LayerPlan, QuantizationPlan
from qdm_deploy.artifacts.recipe import Activations, LayerChoice, Recipe
from qdm_deploy.artifacts.statistics import ActivationStatistics, Histogram, TensorStatistics
from qdm_deploy.artifacts.topology import Layer, Topology
from qdm_deploy.progress import SILENT, Progress

__all__ = ["output_grid", "plan_scales"]


def plan_scales(
    network: nn.Module,
    topology: Topology,
    statistics: ActivationStatistics,
    recipe: Recipe,
    *,
    factors: Mapping[str, ChannelFactors] | None = None,
    importance: Callable[[], NDArray[np.float64]] | None = None,
    provenance: Mapping[str, Any] | None = None,
    progress: Progress = SILENT,
) -> QuantizationPlan:
    """Decide the numbers of every layer: what may be INT8 is.

    Args:
        network: holds the weights.
        topology: the layers in execution order.
        statistics: ranges of every activation.
        recipe: which factors may be used, and how ranges are chosen.
        factors: k by input group, already searched; ``statistics`` then hold x / k where there is one. None decides k
            by the ranges of the skip branches alone.
        importance: weights of the timestep bins of ``statistics``, [M], for the choice of step bins; asked for only
            where there is something to choose. None weighs them equally.
        provenance: what to remember.
        progress: where to report.

    Raises:
        InputError: more step bins than timestep bins were calibrated.
        CalibrationError: weights of the timestep bins that cannot be used.
    """
    groups = topology.groups()
    plans: dict[str, LayerPlan] = {}
    with progress.task("Searching scales", 2 * len(groups)) as advance:
        unsplit: dict[str, _Unsplit] = {}
        for name, layers in groups.items():
            searched = None if factors is None else factors[name]
            unsplit[name] = _cut_nothing(layers[0], statistics.inputs[name], recipe, searched)
            advance()
        bins = _step_bins(groups, statistics, unsplit, recipe.activations, importance)
        # Gain bin of each timestep bin.
        bin_of = np.searchsorted(bins.edges, statistics.timestep_edges[:-1], side="right") - 1
        for name, layers in groups.items():
            decision = _decide_input(layers[0], statistics.inputs[name], unsplit[name], bin_of, bins, recipe)
            for layer in layers:
                weight = layer_of(network, layer.name).get_parameter("weight").detach().numpy()
                plans[layer.name] = _plan_layer(layer, weight, decision, statistics, bin_of, recipe)
            advance()
    for layer in topology:
        if layer.float_reason is not None:
            plans[layer.name] = LayerPlan(layer, "float", reason=layer.float_reason)
    return QuantizationPlan(
        layers=tuple(plans[layer.name] for layer in topology),
        timestep_edges=bins.edges,
        options=recipe.model_dump(mode="json"),
        provenance={
            **(provenance or {}),
            "statistics": dict(statistics.provenance),
            "step_bins": {
                "reason": bins.reason,
                "relative_noise": {str(count): cost for count, cost in bins.costs.items()},
                "layers_with_gains": sum(plan.inverse_r is not None for plan in plans.values()),
            },
        },
    )


@dataclass(frozen=True)
class _Unsplit:
    """What is decided of a shared input before the timestep is cut into bins."""

    whole: Sequence[Histogram]
    factors: tuple[float, ...]
    inverse_k: NDArray[np.float32] | None
    notes: Mapping[str, str]


@dataclass(frozen=True)
class _Input:
    """The decided grid of one shared input tensor."""

    scale: float
    zero_offset: int
    inverse_k: NDArray[np.float32] | None
    inverse_r: NDArray[np.float32] | None
    notes: Mapping[str, str]


def _step_bins(
    groups: Mapping[str, Sequence[Layer]],
    statistics: ActivationStatistics,
    unsplit: Mapping[str, _Unsplit],
    activations: Activations,
    importance: Callable[[], NDArray[np.float64]] | None,
) -> StepBins:
    inputs = [
        GainInput(statistics.inputs[name], unsplit[name].factors)
        for name, layers in groups.items()
        if not layers[0].normalized
    ]
    return choose_step_bins(
        statistics.timestep_edges,
        inputs,
        activations.step_bins,
        zero_offset=activations.zero_offset,
        gain_ratio=activations.gain_ratio,
        importance=importance,
    )


def _merged(tensor: TensorStatistics, time_bins: Sequence[int], branch: int) -> Histogram:
    merged = tensor.histogram(time_bins[0], branch)
    for time_bin in time_bins[1:]:
        merged = merged + tensor.histogram(time_bin, branch)
    return merged


def _cut_nothing(layer: Layer, tensor: TensorStatistics, recipe: Recipe, searched: ChannelFactors | None) -> _Unsplit:
    everything = list(range(len(tensor.counts)))
    whole = [_merged(tensor, everything, branch) for branch in range(tensor.branches)]
    notes: dict[str, str] = {}
    if searched is not None:
        return _Unsplit(whole, (1.0,) * len(whole), searched.inverse_k, {"k": searched.note})
    factors = _branch_factors(layer, whole, recipe, notes)
    inverse_k = None
    if any(factor != 1.0 for factor in factors):
        inverse_k = np.repeat([1.0 / factor for factor in factors], layer.branches).astype(np.float32)
    return _Unsplit(whole, factors, inverse_k, notes)


def _decide_input(
    layer: Layer,
    tensor: TensorStatistics,
    unsplit: _Unsplit,
    bin_of: NDArray[np.int64],
    bins: StepBins,
    recipe: Recipe,
) -> _Input:
    factors, notes = unsplit.factors, dict(unsplit.notes)
    choice = recipe.layer(layer.name)
    gains = _step_gains(layer, tensor, factors, bin_of, bins, recipe, notes)
    if gains is None:
        seen = list(zip(unsplit.whole, factors, strict=True))
    else:
        seen = [
            (_merged(tensor, np.flatnonzero(bin_of == j).tolist(), branch), factors[branch] * gain)
            for j, gain in enumerate(gains)
            for branch in range(tensor.branches)
        ]
    grid = _grid(seen, choice)
    notes["s"] = f"{choice.ranges} range over {len(bin_of)} timestep ranges"
    if not choice.zero_offset:
        notes["z"] = "switched off: symmetric grid"
    else:
        low, high = ((grid.zero_offset + end) * grid.scale for end in ACTIVATION_LEVELS)
        notes["z"] = f"the grid covers {low:.3g} to {high:.3g}"
    inverse_r = None if gains is None else np.array([1.0 / gain for gain in gains], dtype=np.float32)
    return _Input(grid.scale, grid.zero_offset, unsplit.inverse_k, inverse_r, notes)


def _grid(seen: Sequence[tuple[Histogram, float]], choice: LayerChoice) -> ActivationScale:
    return activation_scale(seen, choice.ranges, zero_offset=choice.zero_offset)


def _branch_factors(
    layer: Layer, whole: Sequence[Histogram], recipe: Recipe, notes: dict[str, str]
) -> tuple[float, ...]:
    """k per branch; 1 / k is exact in float16."""
    options = recipe.activations
    ones = (1.0,) * len(whole)
    if not layer.reads_concat:
        return ones
    if options.concat_scales == "none":
        notes["k"] = "switched off: the skip branches share one scale"
        return ones
    if options.concat_scales == "split":
        notes["k"] = "one scale for the skip branches: only what reads the concatenation itself is split"
        return ones
    scales = [_grid([(branch, 1.0)], recipe.layer(layer.name)).scale for branch in whole]
    ratio = max(scales) / min(scales)
    if ratio < options.branch_ratio:
        notes["k"] = f"left out: the branches' ranges differ by {ratio:.2f}, less than {options.branch_ratio}"
        return ones
    # The widest branch keeps its range, the others are stretched to it: all use the whole grid, and the ratio goes
    # into the weight columns, so it is still one integer kernel.
    factors = tuple(1.0 / float(np.float16(max(scales) / scale)) for scale in scales)
    notes["k"] = (
        f"branch factors {', '.join(f'{factor:.3g}' for factor in factors)} from ranges that differ {ratio:.2f}-fold"
    )
    return factors


def _step_gains(
    layer: Layer,
    tensor: TensorStatistics,
    factors: Sequence[float],
    bin_of: NDArray[np.int64],
    bins: StepBins,
    recipe: Recipe,
    notes: dict[str, str],
) -> tuple[float, ...] | None:
    """r per gain bin, at least 1 so that nothing in float16 grows; 1 / r is exact in float16. None: static."""
    options = recipe.activations
    if options.step_bins == 1:
        notes["r"] = "switched off: one step bin"
        return None
    if layer.normalized:
        notes["r"] = (
            "static: a normalization stands before this input, and a multiply here would part it from the quantize"
        )
        return None
    if bins.count == 1:
        notes["r"] = f"static: {bins.reason}"
        return None
    scales = []
    for j in range(bins.count):
        time_bins = np.flatnonzero(bin_of == j).tolist()
        seen = [(_merged(tensor, time_bins, branch), factor) for branch, factor in enumerate(factors)]
        scales.append(_grid(seen, recipe.layer(layer.name)).scale)
    ratio = max(scales) / min(scales)
    if ratio < options.gain_ratio:
        notes["r"] = f"static: the range moves {ratio:.2f}-fold over the timestep bins, less than {options.gain_ratio}"
        return None
    gains = tuple(1.0 / float(np.float16(min(scales) / scale)) for scale in scales)
    notes["r"] = (
        f"gains {', '.join(f'{gain:.3g}' for gain in gains)}: the range moves {ratio:.2f}-fold over the timestep bins "
        f"({bins.reason})"
    )
    return gains


def _plan_layer(
    layer: Layer,
    weight: NDArray[np.float32],
    decision: _Input,
    statistics: ActivationStatistics,
    bin_of: NDArray[np.int64],
    recipe: Recipe,
) -> LayerPlan:
    choice = recipe.layer(layer.name)
    if decision.inverse_k is not None:
        weight = weight / decision.inverse_k.reshape(1, -1, *([1] * (weight.ndim - 2)))
    scale = weight_scale(weight, recipe.weights.ranges, choice.bits)
    notes = dict(decision.notes)
    if layer.upsampled and recipe.weights.upsample_phases:
        scale, said = scale_for_phases(weight, scale, choice.bits)
        notes |= said
    codes = quantize_weight(weight, scale, choice.bits)
    output_scale, output_zero_point = output_grid(layer, decision.inverse_r, statistics, bin_of, choice)
    return LayerPlan(
        layer=layer,
        precision="int8",
        scale=decision.scale,
        zero_offset=decision.zero_offset,
        inverse_k=decision.inverse_k,
        inverse_r=decision.inverse_r,
        weight_codes=codes,
        weight_scale=scale,
        output_scale=output_scale,
        output_zero_point=output_zero_point,
        notes=notes,
        weight_sqnr_db=weight_sqnr_db(weight, codes, scale),
        weight_bits=choice.bits,
    )


def output_grid(
    layer: Layer,
    inverse_r: NDArray[np.float32] | None,
    statistics: ActivationStatistics,
    bin_of: NDArray[np.int64],
    choice: LayerChoice,
) -> tuple[NDArray[np.float32] | None, NDArray[np.uint8] | None]:
    """Grid of what the integer kernel returns: with its bias, or, under gains, before the gain and the bias.

    One grid per channel where a normalization follows: ONNX Runtime normalizes channels first, and there a
    dequantization per channel costs what one with a single scale costs (elsewhere a fifth of the step). Such a grid
    spans what calibration saw of its channel: clipping pays where the widest channel sets the step of all, not here.

    Args:
        layer: the layer; only convolutions have an output grid.
        inverse_r: 1 / r per gain bin, [K]; None where the layer is static.
        statistics: ranges of the outputs and products.
        bin_of: gain bin of each timestep bin, [M].
        choice: how the range is chosen, and whether zero points may differ from 128.

    Returns:
        The scales [O] float32 and the u8 zero points [O]; (None, None) for "linear".
    """
    if layer.kind != "conv":
        return None, None
    if layer.feeds_norm and inverse_r is None:
        return _channel_grids(statistics.outputs[layer.name], zero_offset=choice.zero_offset)
    if inverse_r is None:
        seen = [(_merged(statistics.outputs[layer.name], list(range(len(bin_of))), 0), 1.0)]
    else:
        tensor = statistics.products[layer.name]
        seen = [
            (_merged(tensor, np.flatnonzero(bin_of == j).tolist(), 0), 1.0 / float(inverse))
            for j, inverse in enumerate(inverse_r)
        ]
    grid = _grid(seen, choice)
    scale = np.full(layer.out_channels, grid.scale, dtype=np.float32)
    return scale, np.full(layer.out_channels, 128 - grid.zero_offset, dtype=np.uint8)


def _channel_grids(tensor: TensorStatistics, *, zero_offset: bool) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    low = np.minimum(tensor.channel_min.min(axis=0), 0.0)
    high = np.maximum(tensor.channel_max.max(axis=0), 0.0)
    span = (high - low) / 255 if zero_offset else np.maximum(-low, high) / 127
    # A channel that is always 0 keeps a scale that divides safely.
    scale = np.maximum(span, max(float(span.max()) * 2.0**-12, 1e-9)).astype(np.float32)
    if not zero_offset:
        return scale, np.full(len(scale), 128, dtype=np.uint8)
    return scale, np.clip(np.rint(-low / scale), 0, 255).astype(np.uint8)
