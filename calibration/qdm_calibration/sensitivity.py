"""How much noise each INT8 layer adds to the network's output, measured with one quantized layer at a time.

Rounding errors of different layers are nearly uncorrelated, so their powers add up: the sum over the quantized layers
predicts the noise of the whole plan within a few dB, and a layer's share tells what keeping it in float would remove.
"""

from collections.abc import Set
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qdm_calibration.layers import layer_of, put_layer, sharing_copy
from qdm_calibration.rows import chosen_rows, run_rows
from qdm_calibration.simulate import Simulation, quantized_layer
from qdm_deploy.artifacts.calibration_set import CalibrationSet
from qdm_deploy.artifacts.plan import QuantizationPlan, Target
from qdm_deploy.errors import InputError
from qdm_deploy.progress import SILENT, Progress

__all__ = ["Sensitivity", "measure_sensitivity"]


@dataclass(frozen=True)
class Sensitivity:
    """Noise that each layer, quantized alone, adds to the network's output.

    Attributes:
        layers: the L planned INT8 layers, in execution order.
        timesteps: [M] int64, the distinct timesteps of the rows, rising.
        noise: [L, M] float64, mean squared error of the output against the float network's.
        signal: [M] float64, mean square of the float network's output.
        weights: [M] float64, how much each timestep counts in ``mean_noise``; not all 0.
        macs: [L] int64, multiply-accumulates of each layer for one row.
    """

    layers: tuple[str, ...]
    timesteps: NDArray[np.int64]
    noise: NDArray[np.float64]
    signal: NDArray[np.float64]
    weights: NDArray[np.float64]
    macs: NDArray[np.int64]

    @property
    def mean_noise(self) -> NDArray[np.float64]:
        """Weighted mean over the timesteps, [L] float64."""
        mean: NDArray[np.float64] = self.noise @ self.weights / self.weights.sum()
        return mean

    def shares(self) -> dict[str, float]:
        """Each layer's part of the noise that all of them add; the parts sum to 1 (all 0 where there is no noise)."""
        mean = self.mean_noise
        total = float(mean.sum())
        return {name: float(value) / total if total else 0.0 for name, value in zip(self.layers, mean, strict=True)}

    def worst_shares(self) -> dict[str, float]:
        """Like ``shares``, of the noise at the timestep with the lowest SQNR alone."""
        whole = self.noise.sum(axis=0)
        return self.weighted(np.eye(len(whole))[int(np.argmax(whole / self.signal))]).shares()

    def without(self, kept: Set[str]) -> Self:
        """The same measurement without the layers ``kept`` in float."""
        left = [i for i, name in enumerate(self.layers) if name not in kept]
        layers = tuple(self.layers[i] for i in left)
        return replace(self, layers=layers, noise=self.noise[left], macs=self.macs[left])

    def ranked(self) -> tuple[str, ...]:
        """The layers, the one that adds most noise first."""
        return tuple(self.layers[i] for i in np.argsort(-self.mean_noise, kind="stable"))

    def weighted(self, weights: NDArray[np.float64]) -> Self:
        """The same measurement with other ``weights`` [M].

        Raises:
            InputError: another number of weights than timesteps, a negative one, or nothing but zeros.
        """
        weights = np.asarray(weights, dtype=np.float64)
        if weights.shape != self.timesteps.shape or not (weights >= 0).all() or not weights.sum() > 0:
            raise InputError(
                f"{len(self.timesteps)} timestep weights are needed, none negative and not all 0; given: "
                f"{weights.tolist()}"
            )
        return replace(self, weights=weights)

    def relative(self) -> Self:
        """The same measurement, noise counted relative to each timestep's signal."""
        return self.weighted(1.0 / self.signal)

    def balanced(self) -> Self:
        """The same measurement, noise counted relative to all the noise of each timestep.

        So a share is what a layer's noise does to the mean SQNR in dB: its derivative by the logarithm of that noise.
        Relative to the signal instead, the last steps, where SQNR is some 20 dB less, would decide alone.
        """
        whole = self.noise.sum(axis=0)
        return self.weighted(np.divide(1.0, whole, out=np.zeros_like(whole), where=whole > 0)) if whole.any() else self

    def sqnr_db(self, kept: Set[str] = frozenset()) -> float | None:
        """Predicted SQNR of the output in dB with the layers ``kept`` in float: the mean over the timesteps.

        None where no noise is left.
        """
        quantized = [i for i, name in enumerate(self.layers) if name not in kept]
        noise = self.noise[quantized].sum(axis=0)
        if not (noise > 0).all():
            return None
        return float(np.mean(10 * np.log10(self.signal / noise)))


@torch.inference_mode()
def measure_sensitivity(
    network: nn.Module,
    plan: QuantizationPlan,
    calibration: CalibrationSet,
    *,
    target: Target = "onnxruntime",
    rows: int = 20,
    weights: NDArray[np.float64] | None = None,
    progress: Progress = SILENT,
) -> Sensitivity:
    """Quantize each layer of ``plan`` alone, and compare the output with the float network's.

    Args:
        network: takes (sample, timestep, **conditioning); it is left as it is.
        plan: what to quantize, with which numbers.
        calibration: where the rows are taken from.
        target: whose arithmetic; ``onnxruntime`` also rounds outputs, so it is the least favourable.
        rows: rows to run, evenly over the timesteps, one of them at the last step; they run as one batch.
        weights: of each of the rows' distinct timesteps, rising, [M]; None is uniform.
        progress: where to report.

    Raises:
        InputError: the plan has no INT8 layer, there are no rows, or the weights do not fit.
    """
    if not plan.quantized:
        raise InputError("the plan has no INT8 layer, so there is no sensitivity to measure")
    if rows < 1:
        raise InputError(f"{rows} sensitivity rows were asked for; at least 1 is needed")
    # Layers that are quiet elsewhere make most of the noise of the last step.
    index = chosen_rows(calibration.timestep, rows, last_step=True)

    # One twin that shares every weight; only one of its modules is another at a time.
    twin = Simulation(sharing_copy(network).eval(), plan).eval()
    names = tuple(layer.name for layer in plan.quantized)
    macs = np.zeros(len(names), dtype=np.int64)
    handles = [_count_macs(layer_of(twin.network, name), macs, i) for i, name in enumerate(names)]
    # The predicted noise alone: a learned variance behind it reaches the sample through another path.
    channels = calibration.sample.shape[1]
    expected = run_rows(twin, calibration, index)[:, :channels].double()
    for handle in handles:
        handle.remove()

    rows_noise = np.empty((len(names), len(index)))
    with progress.task("Measuring sensitivity", len(names)) as advance:
        for i, (name, layer) in enumerate(zip(names, plan.quantized, strict=True)):
            module = layer_of(twin.network, name)
            put_layer(twin.network, name, quantized_layer(module, layer, target))
            found = run_rows(twin, calibration, index)[:, :channels].double()
            put_layer(twin.network, name, module)
            rows_noise[i] = _mean_square(found - expected)
            advance()
    distinct, place = np.unique(calibration.timestep[index], return_inverse=True)
    noise = np.stack([rows_noise[:, place == m].mean(axis=1) for m in range(len(distinct))], axis=1)
    power = _mean_square(expected)
    signal = np.array([power[place == m].mean() for m in range(len(distinct))])
    found_all = Sensitivity(names, distinct, noise, signal, np.ones(len(distinct)), macs)
    return found_all if weights is None else found_all.weighted(weights)


def _mean_square(values: Tensor) -> NDArray[np.float64]:
    """Of each row, [B] float64."""
    mean: NDArray[np.float64] = (values**2).flatten(1).mean(dim=1).numpy()
    return mean


def _count_macs(module: nn.Module, macs: NDArray[np.int64], place: int) -> Any:
    """Note a layer's multiply-accumulates per row when it runs: weights times the positions they are applied at."""

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        weight = module.get_parameter("weight")
        macs[place] = weight.numel() * (output.numel() // (len(output) * len(weight)))

    return module.register_forward_hook(note)
