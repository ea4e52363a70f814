"""INT8 beside float on the same seeds.

Teacher-forced: both networks get the float run's x_t, which isolates what quantization does to one call. Free-running:
each follows its own trajectory from the same noise, which shows what accumulates.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.artifacts.model_spec import ModelSpec
from qdm_deploy.artifacts.plan import Target
from qdm_deploy.metrics.error import max_abs_difference, psnr_per_image_db, sqnr_per_step_db
from qdm_deploy.progress import SILENT, Progress
from qdm_deploy.report.model import QualityRow
from qdm_deploy.runtime import Conditioning, StepSession, denoise
from qdm_deploy.samplers import StepTable, initial_noise
from qdm_deploy.samplers.columns import NO_CLIP

__all__ = ["ReferenceRun", "compare_with", "network_output", "output_sqnr_db", "reference_run"]


@dataclass(frozen=True)
class ReferenceRun:
    """The float model on a set of seeds.

    Attributes:
        table, seeds, guidance, conditioning: what was run.
        states: x after each step, [S, N, C, H, W]; the last is the finished sample.
        inputs: x before each step, [S, N, C, H, W].
        outputs: the guided network output at ``inputs``, [S, N, C, H, W].
    """

    table: StepTable
    seeds: Sequence[int]
    guidance: float
    conditioning: Conditioning | None
    states: NDArray[np.float32]
    inputs: NDArray[np.float32]
    outputs: NDArray[np.float32]


def reference_run(
    session: StepSession,
    table: StepTable,
    seeds: Sequence[int],
    model: ModelSpec,
    *,
    conditioning: Conditioning | None = None,
    guidance: float = 1.0,
    batch_size: int = 16,
    progress: Progress = SILENT,
) -> ReferenceRun:
    """Run the float session once, and its network once more on every state it passed."""
    states: list[NDArray[np.float32]] = []
    denoise(
        session, table, seeds, model, conditioning=conditioning, guidance=guidance, batch_size=batch_size,
        description="Float model: denoising", on_step=lambda step, sample: states.append(sample), progress=progress,
    )  # fmt: skip
    inputs = np.stack([initial_noise(seeds, model.sample_shape), *states[:-1]])
    outputs = network_output(
        session,
        table,
        inputs,
        model,
        conditioning,
        guidance,
        batch_size,
        "Float model: its output at each step",
        progress,
    )
    return ReferenceRun(table, tuple(seeds), guidance, conditioning, np.stack(states), inputs, outputs)


def compare_with(
    reference: ReferenceRun,
    session: StepSession,
    model: ModelSpec,
    *,
    target: Target,
    backend: str,
    batch_size: int = 16,
    progress: Progress = SILENT,
) -> tuple[QualityRow, NDArray[np.float32]]:
    """The same seeds through ``session``; returns the measurements and its finished samples [N, C, H, W]."""
    table = reference.table
    name = target if target == backend else f"{target} ({backend})"
    states: list[NDArray[np.float32]] = []
    samples = denoise(
        session, table, reference.seeds, model, conditioning=reference.conditioning, guidance=reference.guidance,
        batch_size=batch_size, description=f"{name}: denoising", on_step=lambda step, sample: states.append(sample),
        progress=progress,
    )  # fmt: skip
    row = QualityRow(
        target=target,
        backend=backend,
        samples=len(reference.seeds),
        steps=len(table.timesteps),
        sampler=table.sampler,
        guidance=reference.guidance,
        timesteps=tuple(int(t) for t in table.timesteps),
        eps_sqnr_db=output_sqnr_db(
            reference,
            session,
            model,
            batch_size=batch_size,
            description=f"{name}: its output at each step",
            progress=progress,
        ),
        state_sqnr_db=sqnr_per_step_db(reference.states, states),
        psnr_db=() if model.sample_kind == "latents" else psnr_per_image_db(reference.states[-1], samples),
        max_abs=max_abs_difference(reference.states[-1], samples),
    )
    return row, samples


def output_sqnr_db(
    reference: ReferenceRun,
    session: StepSession,
    model: ModelSpec,
    *,
    batch_size: int = 16,
    description: str = "The network's output at each step",
    progress: Progress = SILENT,
) -> tuple[float, ...]:
    """Teacher-forced alone: SQNR in dB of the network's output at each step, on the states of the float run."""
    outputs = network_output(
        session, reference.table, reference.inputs, model, reference.conditioning, reference.guidance, batch_size,
        description, progress,
    )  # fmt: skip
    return sqnr_per_step_db(reference.outputs, outputs)


def network_output(
    session: StepSession,
    table: StepTable,
    inputs: NDArray[np.float32],
    model: ModelSpec,
    conditioning: Conditioning | None,
    guidance: float,
    batch_size: int,
    description: str,
    progress: Progress = SILENT,
) -> NDArray[np.float32]:
    """The network's guided output at given states [S, N, C, H, W], read through the step graph itself.

    With p = 0, q = 1, no clipping, b = 1 and everything else 0, a step of the graph returns the network's output.
    """
    coefficients = np.zeros((1, model.num_coefficients), dtype=np.float32)
    coefficients[0, [1, 2, 4]] = 1.0, NO_CLIP, 1.0
    seeds = range(inputs.shape[1])
    outputs = []
    with progress.task(description, len(inputs)) as advance:
        for step, states in enumerate(inputs):
            one = StepTable(table.sampler, table.timesteps[step : step + 1].copy(), coefficients.copy())
            outputs.append(
                denoise(
                    session, one, seeds, model, conditioning=conditioning, guidance=guidance, batch_size=batch_size,
                    initial=states,
                )
            )  # fmt: skip
            advance()
    return np.stack(outputs)
