"""The pictures of a shard, batch by batch: a pure function of the job and their numbers."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.artifacts.bundle import Bundle
from qdm_deploy.artifacts.record import installed_version
from qdm_deploy.batch.job import Job, Shard
from qdm_deploy.components.conditioning import conditioning_of
from qdm_deploy.components.pictures import ImageMetadata, made_by, to_pictures
from qdm_deploy.runtime.denoise import check_denoising, denoise
from qdm_deploy.runtime.rows import conditioning_rows
from qdm_deploy.runtime.session import StepSession
from qdm_deploy.samplers import NoiseSchedule, step_table

__all__ = ["Picture", "PictureSource"]


@dataclass(frozen=True, eq=False)
class Picture:
    """Picture ``index`` of the job: ``pixels`` [H, W] or [H, W, 3] uint8, its class, and how it was made."""

    index: int
    pixels: NDArray[np.uint8]
    label: int | None
    metadata: ImageMetadata


class PictureSource:
    """Makes pictures of a job with an open session.

    Args:
        session: runs the steps.
        bundle: the opened bundle of the session.
        job: what is made.
        states: text states, as ``read_hidden_states`` gives them.

    Raises:
        InputError: the model, its sampler or its conditioning cannot do what the job asks for.
    """

    def __init__(
        self, session: StepSession, bundle: Bundle, job: Job, states: Mapping[str, NDArray[Any]] | None
    ) -> None:
        self._session = session
        self._model = bundle.model
        self._job = job
        self._states = states
        schedule = NoiseSchedule.from_config(bundle.scheduler_config())
        self._table = step_table(
            schedule, job.sampler, job.steps, eta=job.eta, learned_variance=self._model.learned_variance
        )
        self._backend = made_by(session.describe(), job.precision)
        self._version = installed_version() or "unknown"
        # All that the first batch would be refused for: a job that is written down can be made.
        check_denoising(session, self._table, [job.seed], self._model, job.guidance, job.batch_size)
        conditioning = conditioning_of(self._model, 1, label=self._label, hidden_states=states)
        conditioning_rows(self._model, conditioning, 1, twin=job.guidance != 1.0)
        to_pictures(np.zeros((1, *self._model.sample_shape), np.float32), self._model)  # refuses latents

    @property
    def shape(self) -> tuple[int, int, int]:
        """[C, H, W] of a sample."""
        return self._model.sample_shape

    @property
    def _label(self) -> str | None:
        return None if self._job.label is None else str(self._job.label)

    def batches(self, shard: Shard, made: Callable[[int], None]) -> Iterator[list[Picture]]:
        """The pictures of a shard in order, in lists as they were made; ``made`` hears how many are new.

        Raises:
            CheckFailed: a sample became NaN or infinite.
        """
        end = shard.first + shard.count
        for first in range(shard.first, end, self._job.batch_size):
            pictures = self._batch(first)[: end - first]
            yield pictures
            made(len(pictures))

    def _batch(self, first: int) -> list[Picture]:
        """A whole batch, also where the shard or the job ends before it: kernels may depend on the number of rows."""
        size = self._job.batch_size
        seeds = range(self._job.seed + first, self._job.seed + first + size)
        conditioning = conditioning_of(self._model, size, first=first, label=self._label, hidden_states=self._states)
        samples = denoise(
            self._session,
            self._table,
            seeds,
            self._model,
            conditioning=conditioning,
            guidance=self._job.guidance,
            batch_size=size,
        )
        labels = None if conditioning is None else conditioning.class_labels
        return [
            self._picture(first + row, pixels, None if labels is None else int(labels[row]))
            for row, pixels in enumerate(to_pictures(samples, self._model))
        ]

    def _picture(self, index: int, pixels: NDArray[np.uint8], label: int | None) -> Picture:
        names = self._model.labels
        metadata = ImageMetadata(
            version=self._version,
            bundle_id=self._job.bundle_id,
            seed=self._job.seed + index,
            sampler=self._job.sampler,
            steps=self._job.steps,
            eta=self._job.eta,
            guidance=self._job.guidance,
            label=None if label is None else names[label] if names else str(label),
            backend=self._backend,
        )
        return Picture(index, pixels, label, metadata)
