"""The timestep loop: from seeds to samples, on any session.

The whole set of samples takes a step before any of it takes the next one, so an observer sees every sample after each
step; where nobody observes and the session can keep the state (a ``StepLoop``), each batch runs to its end instead. All
inputs are allocated once; a batch is a slice of them. A guided sample holds two rows side by side, its own and its
unconditional twin's, and the step graph keeps both in the same state.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.artifacts.model_spec import ModelSpec
from qdm_deploy.errors import CheckFailed, InputError
from qdm_deploy.progress import SILENT, Advance, Progress
from qdm_deploy.runtime.rows import Conditioning, conditioning_rows, row_links
from qdm_deploy.runtime.session import StepInputs, StepLoop, StepSession
from qdm_deploy.samplers.columns import COEFFICIENTS
from qdm_deploy.samplers.noise import initial_noise, step_noise
from qdm_deploy.samplers.table import StepTable

__all__ = ["Conditioning", "check_denoising", "denoise"]

_NOISE_COLUMN = COEFFICIENTS.index("d")


def denoise(
    session: StepSession,
    table: StepTable,
    seeds: Sequence[int],
    model: ModelSpec,
    *,
    conditioning: Conditioning | None = None,
    guidance: float = 1.0,
    batch_size: int = 16,
    initial: NDArray[np.float32] | None = None,
    description: str = "Denoising",
    on_step: Callable[[int, NDArray[np.float32]], None] | None = None,
    progress: Progress = SILENT,
) -> NDArray[np.float32]:
    """Denoise one sample per seed. A sample depends on its own seed and conditioning, not on the batch it is in.

    Args:
        session: the step graph of ``model`` on some backend.
        table: the sampler's steps.
        seeds: N seeds, 0 .. 2**63 - 1; equal seeds give equal samples.
        model: shapes and conditioning of the model.
        conditioning: needed by a conditional model, refused by another.
        guidance: scale of classifier-free guidance (Ho and Salimans 2022, eq. 6, with scale = w + 1); 1 is none and
            runs one row per sample, any other value runs two.
        batch_size: samples in one run of the session; fewer where its ``max_batch`` rows do not hold so many.
        initial: [N, C, H, W] float32 to start from; None starts from the seeds' unit Gaussian noise.
        description: what the progress task is called.
        on_step: called after each step with its index and a copy of the samples, [N, C, H, W] float32.
        progress: advances by one for each run of the session.

    Returns:
        [N, C, H, W] float32 samples, in the order of the seeds; the caller owns them.

    Raises:
        InputError: seeds, conditioning, guidance, batch size, table or session do not fit the model or each other.
        CheckFailed: a sample became NaN or infinite.
    """
    seeds = list(seeds)
    check_denoising(session, table, seeds, model, guidance, batch_size)
    start = initial_noise(seeds, model.sample_shape) if initial is None else initial
    if start.shape != (len(seeds), *model.sample_shape):
        raise InputError(f"initial has the shape {list(start.shape)}; give {[len(seeds), *model.sample_shape]}")
    twin = guidance != 1.0
    rows_each = 2 if twin else 1
    rows = len(seeds) * rows_each
    own = slice(None, None, rows_each)

    sample = np.zeros((rows, *model.sample_shape), np.float32)
    noise = np.zeros_like(sample)
    timestep = np.zeros(rows, np.int64)
    coefficients = np.zeros((rows, model.num_coefficients), np.float32)
    inputs: dict[str, NDArray[Any]] = {
        "sample": sample,
        "timestep": timestep,
        "coefficients": coefficients,
        "noise": noise,
        "previous_x0": np.zeros_like(sample),
        **conditioning_rows(model, conditioning, len(seeds), twin),
    }
    if model.conditional:
        inputs["guidance"] = np.full(rows, guidance, np.float32)
        inputs.update(row_links(rows, rows_each))
    if set(inputs) != set(session.input_names):
        raise InputError(
            f"the step graph takes {', '.join(session.input_names)}, and the model {model.name!r} gives "
            f"{', '.join(inputs)}: the session is of another model"
        )

    at_once = _samples_at_once(session.max_batch, rows_each, batch_size)
    batches = [_batch(inputs, seeds, first, at_once, rows_each) for first in range(0, len(seeds), at_once)]
    sample[:] = np.repeat(start, rows_each, axis=0)
    steps = len(table.timesteps)
    with progress.task(description, steps * len(batches)) as advance:
        if on_step is None and isinstance(session, StepLoop):
            # Nobody looks at the samples in between, so each batch runs to its end where the session computes.
            for batch_seeds, batch in batches:
                prepared = _prepared(table, batch, batch_seeds, rows_each, model.sample_shape, advance)
                np.copyto(batch["sample"], session.run_steps(batch, prepared).next_sample)
            steps = 0
        for step in range(steps):
            timestep[:] = table.timesteps[step]
            coefficients[:] = table.coefficients[step]
            noisy = table.coefficients[step, _NOISE_COLUMN] != 0
            for batch_seeds, batch in batches:
                if noisy:
                    # A twin takes its owner's state after the step, so its own noise is never used.
                    batch["noise"][own] = step_noise(batch_seeds, step, model.sample_shape)
                result = session.run(batch)
                np.copyto(batch["sample"], result.next_sample)
                np.copyto(batch["previous_x0"], result.x0)
                advance()
            if on_step is not None:
                on_step(step, sample[own].copy())
    samples = np.ascontiguousarray(sample[own])
    _check_finite(samples, seeds, session)
    return samples


def _prepared(
    table: StepTable,
    batch: dict[str, NDArray[Any]],
    seeds: Sequence[int],
    rows_each: int,
    shape: tuple[int, int, int],
    advance: Advance,
) -> Iterator[StepInputs]:
    """What the host makes for each step of one batch, in the batch's own arrays; a session asks for it step by step."""
    for step, (timestep, coefficients) in enumerate(zip(table.timesteps, table.coefficients, strict=True)):
        batch["timestep"][:] = timestep
        batch["coefficients"][:] = coefficients
        noisy = coefficients[_NOISE_COLUMN] != 0
        if noisy:
            batch["noise"][::rows_each] = step_noise(seeds, step, shape)
        yield StepInputs(batch["timestep"], batch["coefficients"], batch["noise"] if noisy else None)
        advance()


def check_denoising(
    session: StepSession, table: StepTable, seeds: Sequence[int], model: ModelSpec, guidance: float, batch_size: int
) -> None:
    """Refuse what ``denoise`` would, its conditioning apart, for those who begin something else before they call it.

    Raises:
        InputError: as ``denoise``.
    """
    if not seeds:
        raise InputError("no seeds were given; give one seed for each sample")
    if batch_size < 1:
        raise InputError(f"the batch size is {batch_size}; give at least 1")
    if not np.isfinite(guidance):
        raise InputError(f"the guidance scale is {guidance}; give a finite number, 1 for none")
    if guidance != 1.0 and not model.conditional:
        raise InputError(
            f"the model {model.name!r} is unconditional, so a guidance scale of {guidance} means nothing; leave it at 1"
        )
    width = table.coefficients.shape[1]
    if width != model.num_coefficients:
        raise InputError(
            f"the sampler table has {width} coefficients a step and the model {model.name!r} takes "
            f"{model.num_coefficients}: make it with learned_variance={model.learned_variance}"
        )
    if table.timesteps.min() < 0 or table.timesteps.max() >= model.num_train_timesteps:
        raise InputError(
            f"the sampler table holds timesteps {table.timesteps.min()} .. {table.timesteps.max()}; the model "
            f"{model.name!r} knows 0 .. {model.num_train_timesteps - 1}"
        )
    if guidance != 1.0 and session.max_batch == 1:
        raise InputError("guidance takes two rows a sample and this session runs one row at a time; set guidance to 1")


def _samples_at_once(max_batch: int | None, rows_each: int, batch_size: int) -> int:
    return batch_size if max_batch is None else min(batch_size, max_batch // rows_each)


def _batch(
    inputs: dict[str, NDArray[Any]], seeds: Sequence[int], first: int, count: int, rows_each: int
) -> tuple[Sequence[int], dict[str, NDArray[Any]]]:
    """One batch: its seeds and its slice of every input; links between rows are relative, so batches share them."""
    batch_seeds = seeds[first : first + count]
    here = slice(first * rows_each, (first + len(batch_seeds)) * rows_each)
    start = slice(0, here.stop - here.start)
    links = ("unconditional_row", "owner_row")
    return batch_seeds, {name: values[start if name in links else here] for name, values in inputs.items()}


def _check_finite(samples: NDArray[np.float32], seeds: Sequence[int], session: StepSession) -> None:
    broken = [seed for seed, sample in zip(seeds, samples, strict=True) if not np.isfinite(sample).all()]
    if broken:
        raise CheckFailed(
            f"{len(broken)} of {len(seeds)} samples became NaN or infinite (first seed: {broken[0]}) on the backend "
            f"{session.describe()['backend']}: run it with precision float to see whether quantization is the cause"
        )
