"""Bias correction: what quantization adds to a layer's output on average is taken from its bias.

The mean of an output channel moves by E[(W_hat - W) x_hat] for the weights and E[W (x_hat - x)] for the activations
(Nagel et al. 2019, arXiv 1906.04721, section 4.2). Both are constants per channel, measured together as the mean error
of the layer on the float network's own inputs; removing them costs nothing at run time.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qdm_calibration.layers import layer_of
from qdm_calibration.reconstruct import held_out
from qdm_calibration.rows import chosen_rows, in_batches, run_rows
from qdm_calibration.simulate import quantized_layer
from qdm_deploy.artifacts.calibration_set import CalibrationSet
from qdm_deploy.artifacts.plan import LayerPlan, QuantizationPlan
from qdm_deploy.errors import InputError
from qdm_deploy.progress import SILENT, Progress

__all__ = ["correct_biases"]

_ROWS = 120


@dataclass
class _Errors:
    """Of one layer, by row: sums over positions, and how many positions there are."""

    per_channel: list[NDArray[np.float64]] = field(default_factory=list)  # [B, O] each
    squared: list[NDArray[np.float64]] = field(default_factory=list)  # [B] each
    positions: int = 0

    def add(self, error: Tensor, channel_axis: int) -> None:
        error = error.double().movedim(channel_axis, 1).flatten(2) if error.ndim > 2 else error.double()[..., None]
        self.positions = error.shape[2]
        self.per_channel.append(error.sum(2).numpy())
        self.squared.append(error.square().sum((1, 2)).numpy())


def correct_biases(
    network: nn.Module,
    plan: QuantizationPlan,
    calibration: CalibrationSet,
    *,
    rows: int = _ROWS,
    batch_size: int = 8,
    progress: Progress = SILENT,
) -> QuantizationPlan:
    """The plan with a ``bias_correction`` wherever it lowers the layer's error on rows that it was not measured on.

    Args:
        network: the float network; takes (sample, timestep, **conditioning).
        plan: final codes and scales. Corrections that it already has are measured anew.
        calibration: network inputs.
        rows: calibration rows to measure on, spread over the timesteps; every fifth of them only judges.
        batch_size: rows per forward pass.
        progress: where to report.

    Raises:
        InputError: fewer than two rows.
    """
    picked = chosen_rows(calibration.timestep, rows)
    if len(picked) < 2:
        raise InputError("bias correction needs at least 2 calibration rows, one of them to judge; calibrate with more")
    bins = plan.bin_of_timestep()
    errors = {layer.name: _Errors() for layer in plan.quantized}
    quantized = {
        layer.name: quantized_layer(layer_of(network, layer.name), replace(layer, bias_correction=None), "tensorrt")
        for layer in plan.quantized
    }

    def hook(layer: LayerPlan) -> Callable[[nn.Module, Any, Tensor], None]:
        def measure(module: nn.Module, args: Any, output: Tensor) -> None:
            found = quantized[layer.name](args[0]) - output
            errors[layer.name].add(found, 1 if layer.layer.kind == "conv" else -1)

        return measure

    handles = [layer_of(network, layer.name).register_forward_hook(hook(layer)) for layer in plan.quantized]
    try:
        with progress.task("Correcting biases", len(picked)) as advance, torch.inference_mode():
            for index in in_batches(picked, batch_size):
                for module in quantized.values():
                    module.time_bin = torch.from_numpy(bins[calibration.timestep[index]])
                run_rows(network, calibration, index)
                advance(len(index))
    finally:
        for handle in handles:
            handle.remove()
    train, judges = (part.numpy() for part in held_out(len(picked)))
    return replace(
        plan,
        layers=tuple(
            _corrected(layer, errors[layer.name], train, judges) if layer.name in errors else layer
            for layer in plan.layers
        ),
    )


def _corrected(layer: LayerPlan, errors: _Errors, train: NDArray[np.int64], judges: NDArray[np.int64]) -> LayerPlan:
    sums, squared = np.concatenate(errors.per_channel), np.concatenate(errors.squared)
    mean = sums[train].mean(axis=0) / errors.positions
    before = float(squared[judges].sum())
    # sum of (e - m)**2 over the rows that judge, from sums of e and e**2
    after = before + float(((mean * errors.positions - 2 * sums[judges]) * mean).sum())
    if not after < before:
        rise = _db(after, before)
        note = f"left as it is: on held-out rows the corrected layer errs {rise:.2f} dB more"
        return replace(layer, bias_correction=None, notes={**layer.notes, "b": note})
    fall = _db(before, after)
    note = f"corrected by up to {np.abs(mean).max():.2g}: the layer's error on held-out rows fell by {fall:.2f} dB"
    return replace(layer, bias_correction=(-mean).astype(np.float32), notes={**layer.notes, "b": note})


def _db(above: float, below: float) -> float:
    return 10 * float(np.log10(max(above, 1e-300) / max(below, 1e-300)))
