"""Per-channel factors k on a layer's input, chosen by the error that the layer itself then makes.

Dividing channel c by k_c and multiplying its weight columns by k_c changes nothing in exact arithmetic, but moves range
between activations and weights (SmoothQuant, arXiv 2211.10438, eq. 4; cross-layer equalisation, arXiv 1906.04721). The
family searched is k_c = (amax_c / max)**alpha, and for a skip concatenation the full fold of its branches' ranges.
Which one is best depends on how the weights share the load, so it is measured: every candidate runs the layer on real
inputs from the trajectory, with the codes it would be deployed with.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qdm_calibration.layers import layer_of
from qdm_calibration.ranges import ActivationScale, activation_scale, quantize_weight, weight_scale
from qdm_calibration.rows import chosen_rows, in_batches, run_rows
from qdm_calibration.simulate import quantized_layer
from qdm_calibration.statistics import TensorCollector
from qdm_deploy.artifacts.calibration_set import CalibrationSet
from qdm_deploy.artifacts.plan import LayerPlan, Target
from qdm_deploy.artifacts.recipe import Recipe
from qdm_deploy.artifacts.statistics import ActivationStatistics, TensorStatistics
from qdm_deploy.artifacts.topology import Layer, Topology
from qdm_deploy.progress import SILENT, Advance, Progress

__all__ = ["ChannelFactors", "free_inputs", "search_channel_factors"]

EXPONENTS = (0.25, 0.5, 0.75)
# A factor that removes less of a layer's error than this is not worth an operation in the graph.
_MIN_GAIN_DB = 0.1
_ROWS = 40
# Where the factor goes, for the note.
_HOMES = {
    None: "",
    "norm": " (in the normalization before it)",
    "weights": " (powers of two, in the weights before it)",
}


@dataclass(frozen=True)
class ChannelFactors:
    """The decision for one shared input.

    Attributes:
        inverse_k: 1 / k per input channel, [C] float32, exact in float16, at least 1; None for no factor.
        note: what was decided and why.
        gain_db: how much less error the layer's output has than without a factor.
    """

    inverse_k: NDArray[np.float32] | None
    note: str
    gain_db: float


def free_inputs(topology: Topology, targets: Collection[Target]) -> frozenset[str]:
    """The shared inputs where a factor per channel costs no kernel on any of these targets.

    What stands before the input takes it (``Layer.absorber``). Else, where codes are unsigned, the quantize of a
    convolution behind a normalization does (``LayerPlan.axis_scale``), and elsewhere a multiply costs a percent of a
    step; on ``tensorrt`` the multiply joins the quantize's own kernel, unless that is one with the normalization and
    SiLU before it, which a multiply would part.

    Args:
        topology: the layers.
        targets: where the plan shall run.
    """

    def free(layer: Layer) -> bool:
        return layer.absorber is not None or all(
            not layer.normalized if target == "tensorrt" else layer.kind == "conv" for target in targets
        )

    return frozenset(name for name, (first, *_) in topology.groups().items() if free(first))


def search_channel_factors(
    network: nn.Module,
    topology: Topology,
    statistics: ActivationStatistics,
    calibration: CalibrationSet,
    recipe: Recipe,
    *,
    channels: Collection[str] | None = None,
    rows: int = _ROWS,
    batch_size: int = 8,
    progress: Progress = SILENT,
) -> dict[str, ChannelFactors]:
    """Choose k for every shared input of the layers that may become INT8.

    Args:
        network: takes (sample, timestep, **conditioning).
        topology: the layers and what they share.
        statistics: channel ranges of every input.
        calibration: where the rows come from that candidates are measured on.
        recipe: how ranges are chosen, bits of the weights that take the factors (fewer bits bear smaller ones), and
            whether to offer the full fold of branch ranges at skip concatenations (``concat_scales`` "branch").
        channels: shared inputs to offer k_c = (amax_c / max)**alpha; None: all. The others are offered the fold alone,
            and that only where no normalization stands before them.
        rows: calibration rows to measure on, spread over the timesteps.
        batch_size: rows per forward pass.
        progress: where to report.
    """
    groups = topology.groups()
    branch_fold = recipe.activations.concat_scales == "branch"
    candidates = {
        name: _candidates(
            layers[0],
            statistics.inputs[name],
            branch_fold=branch_fold and (channels is None or name in channels or not layers[0].normalized),
            channels=channels is None or name in channels,
        )
        for name, layers in groups.items()
    }
    picked = chosen_rows(calibration.timestep, rows)
    searched = {name: groups[name] for name, found in candidates.items() if len(found) > 1}
    collectors = {
        name: [TensorCollector(1, (layers[0].in_channels,)) for _ in candidates[name]]
        for name, layers in searched.items()
    }
    grids: dict[str, list[ActivationScale]] = {}
    errors = {name: np.zeros(len(found)) for name, found in candidates.items()}

    def on_input(name: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, args: Any) -> None:
            conv = searched[name][0].kind == "conv"
            for collector, (_, inverse_k) in zip(collectors[name], candidates[name], strict=True):
                collector.add(0, _scaled(args[0], inverse_k, conv=conv), 1 if conv else -1)

        return hook

    def on_output(name: str, layer: Layer) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            for index, (_, inverse_k) in enumerate(candidates[name]):
                grid, bits = grids[name][index], recipe.layer(layer.name).bits
                errors[name][index] += _error(layer, module, args[0], output, inverse_k, grid, bits)

        return hook

    def run(handles: Sequence[RemovableHandle], advance: Advance) -> None:
        try:
            for batch in in_batches(picked, batch_size):
                run_rows(network, calibration, batch)
                advance(len(batch))
        finally:
            for handle in handles:
                handle.remove()

    with progress.task("Searching channel factors", 2 * len(picked)) as advance, torch.inference_mode():
        run([layer_of(network, name).register_forward_pre_hook(on_input(name)) for name in searched], advance)
        for name, found in collectors.items():
            choice = recipe.layer(groups[name][0].name)
            grids[name] = [
                activation_scale([(item.result().histogram(0), 1.0)], choice.ranges, zero_offset=choice.zero_offset)
                for item in found
            ]
        run(
            [
                layer_of(network, layer.name).register_forward_hook(on_output(name, layer))
                for name, layers in searched.items()
                for layer in layers
            ],
            advance,
        )
    return {name: _decide(groups[name][0], found, errors[name]) for name, found in candidates.items()}


_Candidate = tuple[str, NDArray[np.float32] | None]


def _candidates(layer: Layer, tensor: TensorStatistics, *, branch_fold: bool, channels: bool) -> list[_Candidate]:
    amax = np.maximum(np.abs(tensor.channel_min), np.abs(tensor.channel_max)).max(axis=0).astype(np.float64)
    peak = float(amax.max())
    found: list[_Candidate] = [("none", None)]
    if peak == 0.0:
        return found
    # A channel that calibration hardly saw must not blow up: nothing is stretched more than 64-fold.
    share = np.maximum(amax / peak, 1 / 64)
    if channels:
        found += [(f"alpha {alpha:g}", _inverse(layer, share**-alpha)) for alpha in EXPONENTS]
    if branch_fold and layer.reads_concat:
        ends = np.cumsum(layer.branches)
        per_branch = [float(part.max()) for part in np.split(share, ends[:-1])]
        found.append(("branch fold", _inverse(layer, 1 / np.repeat(per_branch, layer.branches))))
    return found


def _inverse(layer: Layer, values: NDArray[np.float64]) -> NDArray[np.float32]:
    """1 / k, exact in float16; a power of two where the weight scales of other layers take it."""
    if layer.absorber == "weights":
        values = np.exp2(np.round(np.log2(values)))
    return values.astype(np.float16).astype(np.float32)


def _scaled(x: Tensor, inverse_k: NDArray[np.float32] | None, *, conv: bool) -> Tensor:
    if inverse_k is None:
        return x
    return x * torch.from_numpy(inverse_k).reshape((1, -1, 1, 1) if conv else (-1,))


def _error(
    layer: Layer,
    module: nn.Module,
    x: Tensor,
    expected: Tensor,
    inverse_k: NDArray[np.float32] | None,
    grid: ActivationScale,
    weight_bits: int,
) -> float:
    """Squared error of the layer's output with this k, relative to the output's power."""
    weight = module.get_parameter("weight").detach().numpy()
    if inverse_k is not None:
        weight = weight / inverse_k.reshape(1, -1, *([1] * (weight.ndim - 2)))
    scale = weight_scale(weight, "minmax", weight_bits)
    plan = LayerPlan(
        layer, "int8", scale=grid.scale, zero_offset=grid.zero_offset, inverse_k=inverse_k,
        weight_codes=quantize_weight(weight, scale, weight_bits), weight_scale=scale,
    )  # fmt: skip
    got = quantized_layer(module, plan, "tensorrt")(x)
    return float((got - expected).square().sum() / expected.square().sum().clamp_min(1e-30))


def _decide(layer: Layer, candidates: Sequence[_Candidate], errors: NDArray[np.float64]) -> ChannelFactors:
    if len(candidates) == 1:
        return ChannelFactors(None, "none: this input offers no factor", 0.0)
    db: Mapping[str, float] = {
        name: 10 * float(np.log10(max(errors[0], 1e-300) / max(error, 1e-300)))
        for (name, _), error in zip(candidates, errors, strict=True)
    }
    best = max(db, key=lambda name: db[name])
    tried = ", ".join(f"{name} {gain:+.2f} dB" for name, gain in db.items() if name != "none")
    if db[best] < _MIN_GAIN_DB:
        return ChannelFactors(None, f"left out: measured on the layer's output, {tried}", 0.0)
    note = f"{best}{_HOMES[layer.absorber]}: measured on the layer's output, {tried}"
    return ChannelFactors(dict(candidates)[best], note, db[best])
