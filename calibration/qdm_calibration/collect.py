"""The calibration set, collected along the full-precision model's own denoising trajectory.

The sampler is the runtime's own (same coefficient table, same counter-based noise), so a stored row is exactly what a
full-precision deployment would feed its network.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from qdm_calibration.timesteps import SamplingPlan, sampling_plan
from qdm_deploy.artifacts.calibration_set import CalibrationSet
from qdm_deploy.artifacts.pipeline_spec import Denoiser
from qdm_deploy.errors import CalibrationError
from qdm_deploy.progress import SILENT, Progress
from qdm_deploy.samplers import apply_step, step_noise
from qdm_deploy.samplers.conditioning import Conditioning
from qdm_deploy.samplers.sampling import Sampling

__all__ = ["Network", "collect_calibration_set", "guided_output"]


class Network(Protocol):
    """The full-precision network: sample [B, C, H, W], timestep [B] and its conditions to its output."""

    def __call__(self, sample: torch.Tensor, timestep: torch.Tensor, **conditions: torch.Tensor) -> torch.Tensor:
        """One forward pass."""
        ...


@dataclass(frozen=True)
class _Kept:
    """Rows of one step: x, which trajectories they are, and their conditions."""

    sample: NDArray[np.float32]
    trajectory: NDArray[np.int64]
    step: int
    conditions: Mapping[str, NDArray[Any]]


def collect_calibration_set(
    network: Network,
    denoiser: Denoiser,
    sampling: Sampling,
    plan: SamplingPlan,
    *,
    batch_size: int = 16,
    provenance: Mapping[str, Any] | None = None,
    progress: Progress = SILENT,
) -> CalibrationSet:
    """Run the sampler on every seed of ``sampling`` and keep the rows that ``plan`` draws.

    A guided trajectory keeps the unconditional twin of every kept row too, since the compiled network sees both.

    Args:
        network: the full-precision U-Net.
        denoiser: its shapes and conditions.
        sampling: trajectories of the sampler that will be deployed, as many as ``plan.samples``.
        plan: which rows to keep.
        batch_size: rows per forward pass.
        provenance: what to remember about the model.
        progress: where to report.

    Raises:
        InputError: the sampling does not fit the model.
        CalibrationError: the network's output is NaN or infinite.
    """
    sampling.check(denoiser.interface)
    table, shape = sampling.table, denoiser.sample_shape
    draw = sampling_plan(plan, table, denoiser.num_train_timesteps, sampling.seeds[0])
    kept: list[_Kept] = []
    starts = range(0, len(sampling), batch_size)
    with progress.task("Sampling the calibration set", len(starts) * table.steps) as advance:
        for start in starts:
            some = sampling.take(slice(start, start + batch_size))
            index = np.arange(start, start + len(some))
            x = some.start(shape)
            history = np.zeros((len(x), 3 * shape[0], *shape[1:]), np.float32)
            for step in range(table.steps):
                wanted = draw.sample[draw.step == step]
                local = wanted[np.isin(wanted, index)] - start
                if len(local):
                    kept += _rows(x, some, local, start, step)
                output = guided_output(network, x, float(table.timesteps[step]), some.conditioning, some.guidance)
                if not np.isfinite(output).all():
                    raise CalibrationError(
                        f"the full-precision network returned NaN or infinity at timestep {table.timesteps[step]:g}; "
                        "check the checkpoint and its scheduler configuration"
                    )
                coefficients = np.repeat(table.coefficients[step : step + 1], len(x), axis=0)
                x, _, history = apply_step(coefficients, x, output, history, step_noise(some.seeds, step, shape))
                advance()
    return _assemble(kept, sampling, plan, provenance or {})


def guided_output(
    network: Network, x: NDArray[np.float32], timestep: float, conditioning: Conditioning, guidance: float
) -> NDArray[np.float32]:
    """The network's output for x [B, C, H, W] at one timestep, guided where ``guidance`` is not 1."""
    output = _output(network, x, timestep, conditioning.own)
    if guidance == 1.0:
        return output
    base = _output(network, x, timestep, conditioning.unconditional or {})
    guided: NDArray[np.float32] = base + np.float32(guidance) * (output - base)
    return guided


@torch.inference_mode()
def _output(
    network: Network, x: NDArray[np.float32], timestep: float, conditions: Mapping[str, NDArray[Any]]
) -> NDArray[np.float32]:
    whole = timestep.is_integer()
    t = torch.full((len(x),), int(timestep) if whole else timestep, dtype=torch.int64 if whole else torch.float32)
    rows = {name: torch.from_numpy(_for_each(values, len(x))) for name, values in conditions.items()}
    output: NDArray[np.float32] = network(torch.from_numpy(x), t, **rows).numpy()
    return output


def _for_each(values: NDArray[Any], count: int) -> NDArray[Any]:
    return np.repeat(values, count, axis=0) if len(values) == 1 else values


def _rows(x: NDArray[np.float32], some: Sampling, local: NDArray[np.int64], start: int, step: int) -> list[_Kept]:
    """The rows of some samples, and their twins' where they are guided."""
    sets = [some.conditioning.own]
    if some.rows_each == 2:
        sets.append(some.conditioning.unconditional or {})
    return [
        _Kept(
            x[local],
            start + local,
            step,
            {name: _for_each(values, len(x))[local] for name, values in conditions.items()},
        )
        for conditions in sets
    ]


def _assemble(
    kept: list[_Kept], sampling: Sampling, plan: SamplingPlan, provenance: Mapping[str, Any]
) -> CalibrationSet:
    step = np.concatenate([np.full(len(item.sample), item.step, np.int64) for item in kept])
    order = np.argsort(step, kind="stable")  # rows of one timestep side by side, whatever the batches were
    trajectory = np.concatenate([item.trajectory for item in kept])[order]
    table = sampling.table
    return CalibrationSet(
        sample=np.concatenate([item.sample for item in kept])[order],
        # Statistics and gains count whole timesteps; a table that looks one up rounds down too.
        timestep=np.floor(table.timesteps[step[order]]).astype(np.int64),
        seed=np.array(sampling.seeds, dtype=np.int64)[trajectory],
        step=step[order],
        conditioning={
            name: np.concatenate([item.conditions[name] for item in kept])[order] for name in kept[0].conditions
        },
        provenance={
            **provenance,
            "sampler": table.sampler,
            "steps": table.steps,
            "strategy": plan.strategy,
            "samples": plan.samples,
            "seed": sampling.seeds[0],
            "guidance": sampling.guidance,
        },
    )
