"""INT8 beside float on the same seeds.

Teacher-forced: both networks get the float run's x_t, which isolates what quantization does to one call. Free-running:
each follows its own trajectory from the same noise, which shows what accumulates.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.artifacts.plan import Target
from qdm_deploy.components.decoder import SampleDecoder
from qdm_deploy.metrics.error import max_abs_difference, psnr_per_image_db, sqnr_per_step_db
from qdm_deploy.progress import SILENT, Progress
from qdm_deploy.report.model import QualityRow
from qdm_deploy.runtime import StepSession, denoise
from qdm_deploy.samplers import NO_CLIP, StepTable, column
from qdm_deploy.samplers.sampling import Sampling

__all__ = ["ReferenceRun", "compare_with", "network_output", "output_sqnr_db", "reference_run"]


@dataclass(frozen=True)
class ReferenceRun:
    """The float model on a set of seeds.

    Attributes:
        sampling: what was run.
        states: x after each step, [S, N, C, H, W]; the last is the finished sample.
        inputs: x before each step, [S, N, C, H, W].
        outputs: the guided network output at ``inputs``, [S, N, C, H, W].
    """

    sampling: Sampling
    states: NDArray[np.float32]
    inputs: NDArray[np.float32]
    outputs: NDArray[np.float32]


def reference_run(
    session: StepSession, sampling: Sampling, *, batch_size: int = 16, progress: Progress = SILENT
) -> ReferenceRun:
    """Run the float session once, and its network once more on every state it passed."""
    states: list[NDArray[np.float32]] = []
    denoise(
        session, sampling, batch_size=batch_size, description="Float model: denoising",
        on_step=lambda step, sample: states.append(sample), progress=progress,
    )  # fmt: skip
    inputs = np.stack([sampling.start(session.interface.sample_shape), *states[:-1]])
    outputs = network_output(session, sampling, inputs, batch_size, "Float model: its output at each step", progress)
    return ReferenceRun(sampling, np.stack(states), inputs, outputs)


def compare_with(
    reference: ReferenceRun,
    session: StepSession,
    *,
    shown: NDArray[np.float32] | None,
    decoder: SampleDecoder | None,
    target: Target,
    backend: str,
    batch_size: int = 16,
    progress: Progress = SILENT,
) -> tuple[QualityRow, NDArray[np.float32]]:
    """The same seeds through ``session``.

    Args:
        reference: the float run.
        session: what is compared with it.
        shown: pictures of the float run's samples, [N, C, H, W] in [-1, 1]; None where nothing makes pictures of them.
        decoder: makes them of this session's samples.
        target: whose graph it runs.
        backend: what runs it.
        batch_size: samples per step of the network.
        progress: of the runs.

    Returns:
        The measurements, and pictures of the finished samples; the samples themselves where there is no decoder.
    """
    sampling = reference.sampling
    table = sampling.table
    name = target if target == backend else f"{target} ({backend})"
    states: list[NDArray[np.float32]] = []
    samples = denoise(
        session, sampling, batch_size=batch_size, description=f"{name}: denoising",
        on_step=lambda step, sample: states.append(sample), progress=progress,
    )  # fmt: skip
    pictures = samples if decoder is None else decoder.decode(samples)
    row = QualityRow(
        target=target,
        backend=backend,
        samples=len(sampling),
        steps=table.steps,
        sampler=table.sampler,
        guidance=sampling.guidance,
        timesteps=tuple(int(t) for t in table.timesteps),
        eps_sqnr_db=output_sqnr_db(
            reference, session, batch_size=batch_size, description=f"{name}: its output at each step", progress=progress
        ),
        state_sqnr_db=sqnr_per_step_db(reference.states, states),
        psnr_db=() if shown is None else psnr_per_image_db(shown, pictures),
        max_abs=max_abs_difference(reference.states[-1], samples),
    )
    return row, pictures


def output_sqnr_db(
    reference: ReferenceRun,
    session: StepSession,
    *,
    batch_size: int = 16,
    description: str = "The network's output at each step",
    progress: Progress = SILENT,
) -> tuple[float, ...]:
    """Teacher-forced alone: SQNR in dB of the network's output at each step, on the states of the float run."""
    outputs = network_output(session, reference.sampling, reference.inputs, batch_size, description, progress)
    return sqnr_per_step_db(reference.outputs, outputs)


def network_output(
    session: StepSession,
    sampling: Sampling,
    inputs: NDArray[np.float32],
    batch_size: int,
    description: str,
    progress: Progress = SILENT,
) -> NDArray[np.float32]:
    """The network's guided output at given states [S, N, C, H, W], read through the step graph itself.

    Where the sample becomes x0 = e and nothing else is added, a step of the graph returns the network's output.
    """
    table = sampling.table
    coefficients = np.zeros((1, table.coefficients.shape[1]), dtype=np.float32)
    for name, value in (("q", 1.0), ("clip", NO_CLIP), ("b", 1.0)):
        coefficients[0, column(name)] = value
    outputs = []
    with progress.task(description, len(inputs)) as advance:
        for step, states in enumerate(inputs):
            one = StepTable(table.sampler, table.timesteps[step : step + 1].copy(), coefficients.copy())
            outputs.append(denoise(session, replace(sampling, table=one, initial=states), batch_size=batch_size))
            advance()
    return np.stack(outputs)
