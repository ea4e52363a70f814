"""Correction of the network's output: the part of its error that is linear in what a step knows is taken away.

Rounding errors of different steps have different signs and hardly add up over a run. Clipped ranges and rounded weights
leave an error with a direction: at timestep t the INT8 output is ``e (1 + k) + m + l x`` with small k, m and l that are
the same in every sample, for the float output e and the network's input x. At every step the signal is shrunk by some
1e-4, and the finished images have less contrast, which a distance between sets of images sees long before a PSNR does.

PTQD (He et al. 2023, arXiv 2305.10657, sections 4.1 and 4.2) finds k by regression and m as the mean of the rest, per
timestep, on the calibration samples. The output alone does not tell noise from signal where nearly all is noise: x
does. Here k, m and l are tables over the timesteps, which the step graph looks up.
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

_ROWS = 320
# Of the diagonal: at the first steps x is e but for one part in a hundred, and a single row may hold less.
_RIDGE = 1e-10

Array = NDArray[np.float64]


def correct_output(
    network: nn.Module,
    plan: QuantizationPlan,
    calibration: CalibrationSet,
    *,
    rows: int = _ROWS,
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
        rows: calibration rows to measure on, spread over the timesteps; every fifth of them judges first.
        batch_size: rows per forward pass.
        progress: where to report.
    """
    picked = chosen_rows(calibration.timestep, rows)
    plan = replace(plan, output_correction=None)
    if len(picked) < 2 or not plan.quantized:
        return plan
    quantized = simulate(network, plan, "tensorrt")
    # The predicted noise alone: what stands behind it of a learned variance moves no mean.
    channels = calibration.sample.shape[1]
    moments, outputs = [], channels
    with progress.task("Correcting the output", len(picked)) as advance, torch.inference_mode():
        for index in in_batches(picked, batch_size):
            expected = run_rows(network, calibration, index)
            outputs = expected.shape[1]
            error = run_rows(quantized, calibration, index) - expected
            moments.append(
                _moments(expected[:, :channels].numpy(), calibration.sample[index], error[:, :channels].numpy())
            )
            advance(len(index))
    every, timesteps = np.concatenate(moments), calibration.timestep[picked]
    train, judges = (part.numpy() for part in held_out(len(picked)))
    table = _table(every[train], timesteps[train], int(plan.timestep_edges[-1]))
    if not _left(every[judges], table[timesteps[judges]]).mean() < 1:
        return plan
    whole = np.zeros((len(table), 3, outputs), dtype=np.float32)
    whole[:, :, :channels] = _table(every, timesteps, len(table)).transpose(0, 2, 1)
    return replace(plan, output_correction=whole)


def _moments(output: NDArray[np.float32], sample: NDArray[np.float32], error: NDArray[np.float32]) -> Array:
    """[B, C, 4, 4]: mean products of 1, output, sample and error, as a share of the mean square of the row's output."""
    columns = np.stack([np.ones_like(output), output, sample, error], axis=2).astype(np.float64)
    columns = columns.reshape(*columns.shape[:3], -1)
    products = columns @ columns.swapaxes(2, 3) / columns.shape[-1]
    return products / products[:, :, 1, 1].mean(axis=1)[:, None, None, None]  # type: ignore[no-any-return]


def _table(moments: Array, timesteps: NDArray[np.int64], count: int) -> Array:
    """[T, C, 3]: m, k and l, fitted at each timestep that was met with its neighbours, and interpolated between."""
    met, place = np.unique(timesteps, return_inverse=True)
    sums = np.zeros((len(met), *moments.shape[1:]))
    np.add.at(sums, place, moments)
    # A few rows at each timestep say little, and what they measure changes slowly from one to the next.
    sums[:-1], sums[1:] = sums[:-1] + sums[1:] / 2, sums[1:] + sums[:-1] / 2
    products = sums[:, :, :3, :3]
    ridge = _RIDGE * np.trace(products, axis1=2, axis2=3)[:, :, None, None] * np.eye(3)
    at = np.linalg.solve(products + ridge, sums[:, :, :3, 3:])[..., 0]
    every = np.arange(count)
    flat = np.stack([np.interp(every, met, column) for column in at.reshape(len(met), -1).T], axis=1)
    return flat.reshape(count, *at.shape[1:])


def _left(moments: Array, coefficients: Array) -> Array:
    """Of each row's squared error, the share that is left without what the coefficients say of it.

    A share, as decibels count: otherwise the last steps, which have most of the error, would decide for all.
    """
    corrected = np.concatenate([-coefficients, np.ones_like(coefficients[..., :1])], axis=-1)
    left = np.einsum("nci,ncij,ncj->n", corrected, moments, corrected)
    return left / np.maximum(moments[:, :, 3, 3].sum(axis=1), np.finfo(np.float64).tiny)  # type: ignore[no-any-return]
