"""The timestep loop: from seeds to samples, on any session.

The whole set of samples takes a step before any of it takes the next one, so an observer sees every sample after each
step; where nobody observes and the session can keep the state (a ``StepLoop``), each batch runs to its end instead. All
inputs are allocated once; a batch is a slice of them. A guided sample holds two rows side by side, its own and its
unconditional twin's, and the step graph keeps both in the same state.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.artifacts.step_interface import StepInterface
from qdm_deploy.errors import CheckFailed, InputError
from qdm_deploy.progress import SILENT, Advance, Progress
from qdm_deploy.runtime.session import StepInputs, StepLoop, StepSession
from qdm_deploy.samplers.columns import column
from qdm_deploy.samplers.conditioning import row_links, rows_of
from qdm_deploy.samplers.noise import step_noise
from qdm_deploy.samplers.sampling import Sampling

__all__ = ["check_denoising", "denoise", "set_step"]

_NOISE = column("d")


def denoise(
    session: StepSession,
    sampling: Sampling,
    *,
    batch_size: int = 16,
    description: str = "Denoising",
    on_step: Callable[[int, NDArray[np.float32]], None] | None = None,
    progress: Progress = SILENT,
) -> NDArray[np.float32]:
    """Make the samples of ``sampling``.

    Args:
        session: the model's step graph on some backend.
        sampling: what to make.
        batch_size: samples in one run of the session; fewer where its ``max_batch`` rows do not hold so many.
        description: what the progress task is called.
        on_step: called after each step with its index and a copy of the samples, [N, C, H, W] float32.
        progress: advances by one for each run of the session.

    Returns:
        [N, C, H, W] float32 samples, in the order of the seeds; the caller owns them.

    Raises:
        InputError: the sampling, the batch size and the session do not fit each other.
        CheckFailed: a sample became NaN or infinite.
    """
    check_denoising(session, sampling, batch_size)
    interface, table, rows_each = session.interface, sampling.table, sampling.rows_each
    rows = len(sampling) * rows_each
    own = slice(None, None, rows_each)
    inputs = interface.rows(rows)
    inputs |= rows_of(sampling.conditioning, len(sampling), rows_each)
    if interface.conditions:
        inputs["guidance"][:] = sampling.guidance
        inputs |= row_links(rows, rows_each)
    if "guidance_rescale" in inputs:
        inputs["guidance_rescale"][:] = sampling.guidance_rescale
    inputs["sample"][:] = np.repeat(sampling.start(interface.sample_shape), rows_each, axis=0)

    at_once = _samples_at_once(session.max_batch, rows_each, batch_size)
    parts = [slice(first, first + at_once) for first in range(0, len(sampling), at_once)]
    batches = [(sampling.take(part), _batch(interface, inputs, part, rows_each)) for part in parts]
    with progress.task(description, table.steps * len(batches)) as advance:
        if on_step is None and isinstance(session, StepLoop):
            # Nobody looks at the samples in between, so each batch runs to its end where the session computes.
            for some, batch in batches:
                session.run_steps(batch, _prepared(some, batch, advance)).copy_state(batch)
        else:
            for step in range(table.steps):
                for some, batch in batches:
                    set_step(batch, some, step)
                    session.run(batch).copy_state(batch)
                    advance()
                if on_step is not None:
                    on_step(step, inputs["sample"][own].copy())
    samples = np.ascontiguousarray(inputs["sample"][own])
    _check_finite(samples, sampling, session)
    return samples


def set_step(batch: dict[str, NDArray[Any]], sampling: Sampling, step: int) -> bool:
    """Write into a batch what its next step takes from the sampler; whether that step uses noise."""
    table, rows_each = sampling.table, sampling.rows_each
    batch["timestep"][:] = table.timesteps[step]
    batch["coefficients"][:] = table.coefficients[step]
    noisy = bool(table.coefficients[step, _NOISE] != 0)
    if noisy:
        # A twin takes its owner's state after the step, so its own noise is never used.
        batch["noise"][::rows_each] = step_noise(sampling.seeds, step, batch["noise"].shape[1:])
    return noisy


def check_denoising(session: StepSession, sampling: Sampling, batch_size: int) -> None:
    """Refuse what ``denoise`` would, for those who begin something else before they call it.

    Raises:
        InputError: as ``denoise``.
    """
    if batch_size < 1:
        raise InputError(f"the batch size is {batch_size}; give at least 1")
    if sampling.rows_each == 2 and session.max_batch == 1:
        raise InputError("guidance takes two rows a sample and this session runs one row at a time; set guidance to 1")
    sampling.check(session.interface)


def _prepared(sampling: Sampling, batch: dict[str, NDArray[Any]], advance: Advance) -> Iterator[StepInputs]:
    """What the host makes for each step of one batch, in the batch's own arrays; a session asks for it step by step."""
    for step in range(sampling.table.steps):
        noisy = set_step(batch, sampling, step)
        yield StepInputs(batch["timestep"], batch["coefficients"], batch["noise"] if noisy else None)
        advance()


def _samples_at_once(max_batch: int | None, rows_each: int, batch_size: int) -> int:
    return batch_size if max_batch is None else min(batch_size, max_batch // rows_each)


def _batch(
    interface: StepInterface, inputs: dict[str, NDArray[Any]], part: slice, rows_each: int
) -> dict[str, NDArray[Any]]:
    """The rows of some samples, as views; links are relative to the batch, so batches share them."""
    here = slice(part.start * rows_each, part.stop * rows_each)
    count = len(inputs["sample"][here])
    first = slice(0, count)
    return {spec.name: inputs[spec.name][first if spec.role == "link" else here] for spec in interface}


def _check_finite(samples: NDArray[np.float32], sampling: Sampling, session: StepSession) -> None:
    broken = [seed for seed, sample in zip(sampling.seeds, samples, strict=True) if not np.isfinite(sample).all()]
    if broken:
        raise CheckFailed(
            f"{len(broken)} of {len(samples)} samples became NaN or infinite (first seed: {broken[0]}) on the backend "
            f"{session.describe()['backend']}: run it with precision float to see whether quantization is the cause"
        )
