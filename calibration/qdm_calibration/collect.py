"""The calibration set, collected along the full-precision model's own denoising trajectory.

The sampler is the runtime's own (same coefficient table, same counter-based noise), so a stored row is exactly what a
full-precision deployment would feed its network.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from qdm_calibration.timesteps import SamplingPlan, sampling_plan
from qdm_deploy.artifacts.calibration_set import CalibrationSet
from qdm_deploy.artifacts.model_spec import ModelSpec
from qdm_deploy.errors import CalibrationError, InputError
from qdm_deploy.progress import SILENT, Progress
from qdm_deploy.samplers import StepTable, apply_step, initial_noise, step_noise

__all__ = ["Network", "collect_calibration_set", "conditioning_rows", "guided_output", "unconditional_rows"]


class Network(Protocol):
    """The full-precision network: sample [B, C, H, W], timestep [B] and its conditioning to its output."""

    def __call__(self, sample: torch.Tensor, timestep: torch.Tensor, **conditioning: torch.Tensor) -> torch.Tensor:
        """One forward pass."""
        ...


def collect_calibration_set(
    network: Network,
    spec: ModelSpec,
    table: StepTable,
    plan: SamplingPlan,
    *,
    seed: int = 0,
    guidance: float = 1.0,
    conditioning: Mapping[str, NDArray[Any]] | None = None,
    unconditional: Mapping[str, NDArray[Any]] | None = None,
    batch_size: int = 16,
    provenance: Mapping[str, Any] | None = None,
    progress: Progress = SILENT,
) -> CalibrationSet:
    """Run the sampler on ``plan.samples`` seeds and keep the rows that ``plan`` draws.

    Args:
        network: the full-precision U-Net.
        spec: its shapes and conditioning.
        table: timesteps and coefficients of the sampler that will be deployed.
        plan: which rows to keep.
        seed: first request seed; trajectory i uses seed + i.
        guidance: classifier-free guidance weight; with a value other than 1 the trajectory is guided and the
            unconditional twin of every kept row is kept too, since the compiled network sees both.
        conditioning: conditioning of each trajectory by input name, [samples, ...]; labels default to all classes in
            turn.
        unconditional: the unconditional counterpart of one sample by input name; labels default to the null label.
        batch_size: rows per forward pass.
        provenance: what to remember about the model.
        progress: where to report.

    Raises:
        InputError: guidance without an unconditional counterpart, or conditioning of the wrong length.
        CalibrationError: the network's output is NaN or infinite.
    """
    seeds = [seed + i for i in range(plan.samples)]
    given = conditioning_rows(spec, plan.samples, conditioning)
    twin = unconditional_rows(spec, plan.samples, unconditional) if guidance != 1.0 else None
    draw = sampling_plan(plan, table, spec.num_train_timesteps, seed)
    kept: list[tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64], Mapping[str, NDArray[Any]]]] = []
    batches = [range(start, min(start + batch_size, plan.samples)) for start in range(0, plan.samples, batch_size)]
    with progress.task("Sampling the calibration set", len(batches) * len(table.timesteps)) as advance:
        for rows in batches:
            index = np.array(rows)
            x = initial_noise([seeds[i] for i in rows], spec.sample_shape)
            previous_x0 = np.zeros_like(x)
            batch_conditioning = {name: values[index] for name, values in given.items()}
            batch_twin = None if twin is None else {name: values[index] for name, values in twin.items()}
            for step, timestep in enumerate(table.timesteps):
                wanted = draw.sample[draw.step == step]
                local = wanted[np.isin(wanted, index)] - index[0]
                if len(local):
                    kept.append((x[local], index[local], np.full(len(local), step), _take(batch_conditioning, local)))
                    if batch_twin is not None:
                        kept.append((x[local], index[local], np.full(len(local), step), _take(batch_twin, local)))
                output = guided_output(network, x, int(timestep), batch_conditioning, batch_twin, guidance)
                if not np.isfinite(output).all():
                    raise CalibrationError(
                        f"the full-precision network returned NaN or infinity at timestep {int(timestep)}; "
                        "check the checkpoint and its scheduler configuration"
                    )
                coefficients = np.repeat(table.coefficients[step : step + 1], len(x), axis=0)
                noise = step_noise([seeds[i] for i in rows], step, spec.sample_shape)
                x, previous_x0 = apply_step(coefficients, x, output, previous_x0, noise)
                advance()
    return _assemble(kept, table, seeds, plan, seed, guidance, provenance or {})


def conditioning_rows(
    spec: ModelSpec, samples: int, conditioning: Mapping[str, NDArray[Any]] | None
) -> dict[str, NDArray[Any]]:
    """The conditioning of each sample: as given, or all class labels in turn."""
    _refuse_unknown(spec, conditioning)
    rows: dict[str, NDArray[Any]] = {}
    for item in spec.conditioning:
        if conditioning is not None and item.name in conditioning:
            values = conditioning[item.name]
            if len(values) == 0:
                raise InputError(f"the given {item.name} has no rows; give at least one per calibration sample")
            rows[item.name] = np.asarray(values, dtype=item.dtype)[np.arange(samples) % len(values)]
        elif item.name == "class_labels" and spec.num_classes:
            rows[item.name] = np.arange(samples, dtype=np.int64) % spec.num_classes
        else:
            raise InputError(
                f"{spec.name} is conditioned on {item.name} {list(item.shape)} and none were given; calibration needs "
                "them (a safetensors file with one row per sample)"
            )
        if rows[item.name].shape[1:] != item.shape:
            raise InputError(
                f"{item.name} has rows of shape {rows[item.name].shape[1:]}; {spec.name} takes {item.shape}"
            )
        if item.name == "class_labels":
            _refuse_unknown_labels(spec, rows[item.name])
    return rows


def _refuse_unknown(spec: ModelSpec, conditioning: Mapping[str, NDArray[Any]] | None) -> None:
    known = [item.name for item in spec.conditioning]
    for name in conditioning or {}:
        if name not in known:
            raise InputError(f"{spec.name} has no conditioning input {name!r}; it takes {', '.join(known) or 'none'}")


def _refuse_unknown_labels(spec: ModelSpec, labels: NDArray[Any]) -> None:
    embeddings = (spec.num_classes or 0) + (spec.null_label is not None)
    outside = labels[(labels < 0) | (labels >= embeddings)]
    if len(outside):
        raise InputError(f"class_labels holds {outside[0]}; {spec.name} has labels 0 .. {embeddings - 1}")


def unconditional_rows(
    spec: ModelSpec, samples: int, unconditional: Mapping[str, NDArray[Any]] | None
) -> dict[str, NDArray[Any]]:
    """The unconditional counterpart of each sample: as given for one, or the null label."""
    _refuse_unknown(spec, unconditional)
    rows: dict[str, NDArray[Any]] = {}
    for item in spec.conditioning:
        if unconditional is not None and item.name in unconditional:
            value = np.asarray(unconditional[item.name], dtype=item.dtype)
        elif item.name == "class_labels" and spec.null_label is not None:
            value = np.asarray(spec.null_label, dtype=np.int64)
        else:
            raise InputError(
                f"guidance needs an unconditional {item.name}, and {spec.name} has none; give one, or use guidance 1"
            )
        if value.shape != item.shape:
            raise InputError(f"the unconditional {item.name} has shape {value.shape}; {spec.name} takes {item.shape}")
        if item.name == "class_labels":
            _refuse_unknown_labels(spec, value[None])
        rows[item.name] = np.repeat(value[None], samples, axis=0)
    if not rows:
        raise InputError(f"{spec.name} is unconditional, so there is nothing to guide; use guidance 1")
    return rows


def _take(values: Mapping[str, NDArray[Any]], rows: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    return {name: value[rows] for name, value in values.items()}


@torch.inference_mode()
def guided_output(
    network: Network,
    x: NDArray[np.float32],
    timestep: int,
    conditioning: Mapping[str, NDArray[Any]],
    unconditional: Mapping[str, NDArray[Any]] | None,
    guidance: float,
) -> NDArray[np.float32]:
    """The network's output for x [B, C, H, W] at one timestep, guided where there is an ``unconditional`` twin."""
    sample = torch.from_numpy(x)
    t = torch.full((len(x),), timestep, dtype=torch.int64)
    output: NDArray[np.float32] = network(sample, t, **_tensors(conditioning)).numpy()
    if unconditional is None:
        return output
    base: NDArray[np.float32] = network(sample, t, **_tensors(unconditional)).numpy()
    guided: NDArray[np.float32] = base + np.float32(guidance) * (output - base)
    return guided


def _tensors(values: Mapping[str, NDArray[Any]]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in values.items()}


def _assemble(
    kept: Sequence[tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64], Mapping[str, NDArray[Any]]]],
    table: StepTable,
    seeds: Sequence[int],
    plan: SamplingPlan,
    seed: int,
    guidance: float,
    provenance: Mapping[str, Any],
) -> CalibrationSet:
    step = np.concatenate([item[2] for item in kept])
    order = np.argsort(step, kind="stable")  # rows of one timestep side by side, whatever the batches were
    trajectory = np.concatenate([item[1] for item in kept])[order]
    return CalibrationSet(
        sample=np.concatenate([item[0] for item in kept])[order],
        timestep=table.timesteps[step[order]],
        seed=np.array(seeds, dtype=np.int64)[trajectory],
        step=step[order],
        conditioning={name: np.concatenate([item[3][name] for item in kept])[order] for name in kept[0][3]},
        provenance={
            **provenance,
            "sampler": table.sampler,
            "steps": len(table.timesteps),
            "strategy": plan.strategy,
            "samples": plan.samples,
            "seed": seed,
            "guidance": guidance,
        },
    )
