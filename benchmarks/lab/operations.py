"""Operation selection of PTQ4DM (section 3.2, table 1): the sampler's own tensors in eight bits.

One ancestral step computes mu from x_t and the network's output, the variance Sigma, and x_{t-1} = mu + sqrt(Sigma) z.
Each of the three, or all, is rounded to a symmetric s8 grid with one static scale; the network stays float, so that
nothing else is seen. The variance of the demo model is fixed: Sigma is one number a step, rounded on one grid for all.

Teacher-forced network outputs do not see any of this: the finished images and the states are compared with the float
run on the same noise.
"""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
import torch
from lab.laboratory import BATCH, PSNR, Laboratory
from lib.case import conditioning_of
from numpy.typing import NDArray

from qdm_calibration.ranges import activation_scale
from qdm_calibration.statistics import TensorCollector
from qdm_deploy.artifacts.pipeline_spec import PipelineSpec
from qdm_deploy.metrics.error import psnr_per_image_db, sqnr_per_step_db
from qdm_deploy.samplers import StepTable, initial_noise, step_noise, step_table
from qdm_deploy.samplers.columns import COEFFICIENTS

MU, SIGMA, PREVIOUS = "mu", "Sigma", "x_{t-1}"
OPERATIONS = (MU, SIGMA, PREVIOUS)

Array = NDArray[np.float32]
Rounding = Mapping[str, Callable[[Array], Array]]


def grid(scale: float, bits: int = 8) -> Callable[[Array], Array]:
    """Rounds to the nearest of -2**(bits - 1) .. 2**(bits - 1) - 1 steps of ``scale``, half to even."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return lambda values: (np.clip(np.rint(values / scale), low, high) * scale).astype(np.float32)


def ancestral_step(
    coefficients: Array,
    sample: Array,
    output: Array,
    noise: Array,
    grids: Rounding,
    seen: Callable[[str, Array], None] = lambda operation, values: None,
) -> Array:
    """x_{t-1} [B, C, H, W] from x_t, the network's output and noise; DDPM (arXiv 2006.11239), eq. 7.

    Args:
        coefficients: [13] float32, a row of a "ddpm" table (``qdm_deploy.samplers.columns``).
        sample: x_t, [B, C, H, W] float32.
        output: the network's epsilon, of the same shape.
        noise: standard normal, of the same shape.
        grids: what rounds an operation's result, by ``OPERATIONS``; the others stay float.
        seen: gets every operation's result before it is rounded.
    """
    p, q, clip, a, b, d = (coefficients[COEFFICIENTS.index(name)] for name in ("p", "q", "clip", "a", "b", "d"))

    def result(operation: str, values: Array) -> Array:
        seen(operation, values)
        return grids[operation](values) if operation in grids else values

    mu = result(MU, a * sample + b * np.clip(p * sample + q * output, -clip, clip))
    return result(PREVIOUS, mu + np.sqrt(result(SIGMA, np.full_like(sample, d * d))) * noise)


@torch.inference_mode()
def ancestral_run(
    network: torch.nn.Module, spec: PipelineSpec, table: StepTable, seeds: Sequence[int], grids: Rounding, **seen: Any
) -> NDArray[np.float32]:
    """x after each step, [S, N, C, H, W], with the network in float; labels are all classes in turn."""
    given = conditioning_of(spec, len(seeds))
    states = np.empty((table.steps, len(seeds), *spec.sample_shape), np.float32)
    for start in range(0, len(seeds), BATCH):
        rows = slice(start, start + BATCH)
        x = initial_noise(seeds[rows], spec.sample_shape)
        conditions = {name: torch.from_numpy(values) for name, values in given.take(rows).own.items()}
        for step, timestep in enumerate(table.timesteps.tolist()):
            output = network(torch.from_numpy(x), torch.full((len(x),), int(timestep)), **conditions).numpy()
            noise = step_noise(seeds[rows], step, spec.sample_shape)
            states[step, rows] = x = ancestral_step(table.coefficients[step], x, output, noise, grids, **seen)
    return states


def operation_numbers(quantized: Sequence[str], lab: Laboratory) -> dict[str, float]:
    """The finished images and the states of the run with those operations rounded, against the float run."""
    model, unet, spec = lab.model, lab.model.checkpoint.unet, lab.model.spec
    table = step_table(model.schedule, "ddpm", lab.settings.steps)

    def grids() -> Rounding:
        """By MSE ranges of the three over a float run on the calibration's seeds."""
        collectors = {name: TensorCollector(1, (spec.sample_shape[0],)) for name in OPERATIONS}
        ancestral_run(
            unet, spec, table, range(lab.first, lab.first + lab.settings.calibration_samples), {},
            seen=lambda name, values: collectors[name].add(0, torch.from_numpy(values), 1),
        )  # fmt: skip
        found = {name: collector.result().histogram(0) for name, collector in collectors.items()}
        return {
            name: grid(activation_scale([(each, 1.0)], "mse", zero_offset=False).scale) for name, each in found.items()
        }

    found = lab.shared("operation grids", grids)
    reference = model.shared("ancestral float run", lambda: ancestral_run(unet, spec, table, model.seeds, {}))
    states = ancestral_run(unet, spec, table, model.seeds, {name: found[name] for name in quantized})
    images = psnr_per_image_db(reference[-1], states[-1])
    return {PSNR: fmean(images), "worst PSNR": min(images), "x_t SQNR dB": fmean(sqnr_per_step_db(reference, states))}
