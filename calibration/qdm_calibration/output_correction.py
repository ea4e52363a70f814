"""Correction of the network's output: what quantization adds to it on average, per timestep and channel, is taken away.

Rounding errors of different steps have different signs and hardly add up over a run; what is clipped or rounded in the
weights has one sign, and moves the mean of the output the same way at every step and in every sample. PTQD (He et al.
2023, arXiv 2305.10657, section 4.2, "bias correction") measures that mean per timestep on the calibration samples and
subtracts it from the output. Here it is a table [T, C] that the step graph looks up.
"""

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from qdm_calibration.reconstruct import held_out
from qdm_calibration.rows import chosen_rows, in_batches, run_rows
from qdm_calibration.simulate import simulate
from qdm_deploy.artifacts.calibration_set import CalibrationSet
from qdm_deploy.artifacts.plan import QuantizationPlan
from qdm_deploy.progress import SILENT, Progress

__all__ = ["correct_output"]

_ROWS = 208


def correct_output(
    network: nn.Module,
    plan: QuantizationPlan,
    calibration: CalibrationSet,
    *,
    rows: int = _ROWS,
    submodule_prefix: str = "unet.",
    batch_size: int = 8,
    progress: Progress = SILENT,
) -> QuantizationPlan:
    """The plan with an ``output_correction``, if it lowers the error of rows that it was not measured on.

    Measured on the simulation of the target ``tensorrt``, whose integers ``openvino`` has too; what ``onnxruntime``
    rounds in addition has no preferred sign. Between measured timesteps the correction is interpolated.

    Args:
        network: the float network; takes (sample, timestep, **conditioning).
        plan: final, but for the correction; one that it already has is measured anew.
        calibration: network inputs.
        rows: calibration rows to measure on, spread over the timesteps; every fifth of them only judges.
        submodule_prefix: where the U-Net sits inside ``network``.
        batch_size: rows per forward pass.
        progress: where to report.
    """
    picked = chosen_rows(calibration.timestep, rows)
    plan = replace(plan, output_correction=None)
    if len(picked) < 2 or not plan.quantized:
        return plan
    quantized = simulate(network, plan, "tensorrt", submodule_prefix=submodule_prefix)
    # The predicted noise alone: what stands behind it of a learned variance moves no mean.
    channels = calibration.sample.shape[1]
    means, powers, outputs = [], [], channels
    with progress.task("Correcting the output", len(picked)) as advance, torch.inference_mode():
        for index in in_batches(picked, batch_size):
            expected = run_rows(network, calibration, index)
            outputs = expected.shape[1]
            error = (run_rows(quantized, calibration, index) - expected)[:, :channels].double().flatten(2)
            means.append(error.mean(dim=2).numpy())
            powers.append(expected[:, :channels].double().flatten(1).square().mean(dim=1).numpy())
            advance(len(index))
    mean, timesteps = np.concatenate(means), calibration.timestep[picked]
    train, judges = (part.numpy() for part in held_out(len(picked)))
    table = _table(mean[train], timesteps[train], int(plan.timestep_edges[-1]))
    # Relative to the signal of each row, as decibels count: otherwise the first steps alone would decide.
    weight = 1 / np.concatenate(powers)[judges]
    before = (mean[judges] ** 2).sum(axis=1) @ weight
    after = ((mean[judges] - table[timesteps[judges]]) ** 2).sum(axis=1) @ weight
    if not after < before:
        return plan
    whole = np.zeros((len(table), outputs), dtype=np.float32)
    whole[:, :channels] = table
    return replace(plan, output_correction=whole)


def _table(mean: NDArray[np.float64], timesteps: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    """[T, C] from the mean errors [N, C] of rows: their mean at each timestep that was met, interpolated between."""
    met, place = np.unique(timesteps, return_inverse=True)
    sums = np.zeros((len(met), mean.shape[1]))
    np.add.at(sums, place, mean)
    at = sums / np.bincount(place)[:, None]
    every = np.arange(count)
    return np.stack([np.interp(every, met, column) for column in at.T], axis=1)
