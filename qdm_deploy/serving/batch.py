"""One run of the session over images at different steps, packed into a batch of an allowed size.

Every row holds one image's own timestep, coefficients, noise and conditioning, so nothing about a row depends on the
rows beside it. Rows that only fill the batch are zeros with links to themselves; what comes out of them is not read.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.artifacts.model_spec import ModelSpec
from qdm_deploy.errors import InputError
from qdm_deploy.runtime.rows import row_links
from qdm_deploy.runtime.session import StepOutput, StepSession
from qdm_deploy.samplers import step_noise
from qdm_deploy.samplers.columns import COEFFICIENTS
from qdm_deploy.serving.scheduler import Image

__all__ = ["BatchRunner", "batch_sizes"]

_NOISE_COLUMN = COEFFICIENTS.index("d")
# At most a third of a batch is padding, and a large batch divides into equal parts (``runtime.row_parts``).
_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)


def batch_sizes(max_rows: int, *, deterministic: bool) -> tuple[int, ...]:
    """Batch sizes to run, rising; few of them, because backends prepare each one by itself.

    Args:
        max_rows: the largest.
        deterministic: one size only, because a kernel may round otherwise in a batch of another size.
    """
    if deterministic:
        return (max_rows,)
    return (*(size for size in _SIZES if size < max_rows), max_rows)


class BatchRunner:
    """Runs images on a session, each one step further.

    Args:
        session: the step graph of ``model``; not closed here.
        model: shapes and conditioning.
        max_rows: rows of the largest batch.
        sizes: allowed batch sizes, rising up to ``max_rows``.

    Raises:
        InputError: the session is of another model.
    """

    def __init__(self, session: StepSession, model: ModelSpec, max_rows: int, sizes: Sequence[int]) -> None:
        self._model = model
        self._sizes = sizes
        self._session = session
        self.max_rows = max_rows
        shape = (max_rows, *model.sample_shape)
        self._rows: dict[str, NDArray[Any]] = {
            "sample": np.zeros(shape, np.float32),
            "timestep": np.zeros(max_rows, np.int64),
            "coefficients": np.zeros((max_rows, model.num_coefficients), np.float32),
            "noise": np.zeros(shape, np.float32),
            "previous_x0": np.zeros(shape, np.float32),
        }
        for item in model.conditioning:
            self._rows[item.name] = np.zeros((max_rows, *item.shape), item.dtype)
        if model.conditional:
            self._rows["guidance"] = np.ones(max_rows, np.float32)
            self._rows["unconditional_row"] = np.arange(max_rows)
            self._rows["owner_row"] = np.arange(max_rows)
        if set(self._rows) != set(session.input_names):
            raise InputError(
                f"the step graph takes {', '.join(session.input_names)}, and the model {model.name!r} gives "
                f"{', '.join(self._rows)}: the session is of another model"
            )

    def warm_up(self) -> None:
        """Run every size once on nothing, so that no request waits for a kernel to be compiled.

        Rows that are linked in pairs may be cut into other parts than single ones, so both are run.
        """
        for size in self._sizes:
            self._clear(0, size)
            self._run_rows(size)
            if self._model.conditional and size > 1:
                for name, links in row_links(size - size % 2, 2).items():
                    self._rows[name][: len(links)] = links
                self._run_rows(size)

    def run(self, images: Sequence[Image]) -> int:
        """Take one step with each image and return how many rows were padding.

        Raises:
            Exception: whatever the backend raises; no image moved then.
        """
        # Pairs in front stand at even rows, so a session can cut the batch into parts of even rows between them.
        images = sorted(images, key=lambda image: -image.job.rows_each)
        first_rows: list[int] = []
        used = 0
        for image in images:
            first_rows.append(used)
            used += self._put(image, used)
        size = next(size for size in self._sizes if size >= used)
        self._clear(used, size)
        result = self._run_rows(size)
        for image, row in zip(images, first_rows, strict=True):
            image.sample[...] = result.next_sample[row]
            image.previous_x0[...] = result.x0[row]
            image.step += 1
        return size - used

    def _run_rows(self, size: int) -> StepOutput:
        return self._session.run({name: values[:size] for name, values in self._rows.items()})

    def _put(self, image: Image, first: int) -> int:
        """Write one image's rows from row ``first`` on; how many they are."""
        job = image.job
        here = slice(first, first + job.rows_each)
        rows = self._rows
        coefficients = job.table.coefficients[image.step]
        rows["sample"][here] = image.sample
        rows["previous_x0"][here] = image.previous_x0
        rows["timestep"][here] = job.table.timesteps[image.step]
        rows["coefficients"][here] = coefficients
        # A twin takes its owner's state after the step, so its own noise is never used. Left-over noise is cleared, not
        # multiplied by zero: another image's must have no way in.
        rows["noise"][here] = 0
        if coefficients[_NOISE_COLUMN] != 0:
            rows["noise"][first] = step_noise([image.seed], image.step, self._model.sample_shape)[0]
        for name, values in job.conditioning(image.index).items():
            rows[name][here] = values
        if "guidance" in rows:
            rows["guidance"][here] = job.guidance
            rows["owner_row"][here] = first
            rows["unconditional_row"][here] = here.stop - 1
        return job.rows_each

    def _clear(self, first: int, stop: int) -> None:
        for name, values in self._rows.items():
            values[first:stop] = 0
            if name == "guidance":
                values[first:stop] = 1
            elif name in ("unconditional_row", "owner_row"):
                values[first:stop] = np.arange(first, stop)
