"""One run of the session over images at different steps, packed into a batch of an allowed size.

Every row holds one image's own timestep, coefficients, noise and conditioning, so nothing about a row depends on the
rows beside it. Rows that only fill the batch are zeros with links to themselves; what comes out of them is not read.
"""

from collections.abc import Sequence

from qdm_deploy.runtime.denoise import set_step
from qdm_deploy.runtime.session import StepSession
from qdm_deploy.samplers.conditioning import row_links, rows_of
from qdm_deploy.serving.scheduler import Image

__all__ = ["BatchRunner", "batch_sizes"]

# At most a third of a batch is padding.
_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)


def batch_sizes(max_rows: int, *, fixed_shapes: bool, deterministic: bool) -> tuple[int, ...] | None:
    """Batch sizes to run, rising; None is any number of rows.

    Args:
        max_rows: the largest.
        fixed_shapes: the backend compiles each batch size by itself, so there must be few of them.
        deterministic: one size only, because a kernel may round otherwise in a batch of another size.
    """
    if deterministic:
        return (max_rows,)
    if not fixed_shapes:
        return None
    return (*(size for size in _SIZES if size < max_rows), max_rows)


class BatchRunner:
    """Runs images on a session, each one step further.

    Args:
        session: the model's step graph; not closed here.
        max_rows: rows of the largest batch.
        sizes: allowed batch sizes, rising up to ``max_rows``; None allows all.
    """

    def __init__(self, session: StepSession, max_rows: int, sizes: Sequence[int] | None) -> None:
        self._session = session
        self._interface = session.interface
        self._sizes = sizes
        self.max_rows = max_rows
        self._neutral = self._interface.rows(max_rows)
        self._rows = self._interface.rows(max_rows)

    def warm_up(self) -> None:
        """Run every size once on nothing, so that no request waits for a kernel to be compiled."""
        self._clear(0, self.max_rows)
        for size in self._sizes or sorted({1, self.max_rows}):
            self._session.run({name: values[:size] for name, values in self._rows.items()})

    def run(self, images: Sequence[Image]) -> int:
        """Take one step with each image and return how many rows were padding.

        Raises:
            Exception: whatever the backend raises; no image moved.
        """
        first_rows: list[int] = []
        used = 0
        for image in images:
            first_rows.append(used)
            used += self._put(image, used)
        size = used if self._sizes is None else next(size for size in self._sizes if size >= used)
        self._clear(used, size)
        result = self._session.run({name: values[:size] for name, values in self._rows.items()})
        for image, row in zip(images, first_rows, strict=True):
            for name, output in self._interface.feedback:
                image.state[name][...] = getattr(result, output)[row]
            image.x0 = result.x0[row].copy()
            image.step += 1
        return size - used

    def _put(self, image: Image, first: int) -> int:
        """Write one image's rows from row ``first`` on; how many they are."""
        sampling, rows_each = image.sampling, image.job.rows_each
        here = slice(first, first + rows_each)
        # Left-over noise is cleared, not multiplied by zero: another image's must have no way in.
        self._clear(here.start, here.stop)
        rows = {name: values[here] for name, values in self._rows.items()}
        for name, state in image.state.items():
            rows[name][:] = state
        for name, condition in rows_of(sampling.conditioning, 1, rows_each).items():
            rows[name][:] = condition
        set_step(rows, sampling, image.step)
        if self._interface.conditions:
            rows["guidance"][:] = sampling.guidance
            for name, link in row_links(rows_each, rows_each).items():
                rows[name][:] = first + link
        if "guidance_rescale" in rows:
            rows["guidance_rescale"][:] = sampling.guidance_rescale
        return rows_each

    def _clear(self, first: int, stop: int) -> None:
        for name, values in self._rows.items():
            values[first:stop] = self._neutral[name][first:stop]
