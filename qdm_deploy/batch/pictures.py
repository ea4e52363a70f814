"""The pictures of a shard, batch by batch: a pure function of the job and their numbers."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.artifacts.bundle import Bundle
from qdm_deploy.artifacts.record import installed_version
from qdm_deploy.batch.job import Job, Shard
from qdm_deploy.components.decoder import open_decoder
from qdm_deploy.components.encoders import Encoder, LabelEncoder
from qdm_deploy.components.pictures import ImageMetadata, made_by, to_pictures
from qdm_deploy.components.sampling import SamplingMaker, SamplingOptions
from qdm_deploy.runtime.denoise import check_denoising, denoise
from qdm_deploy.runtime.session import StepSession

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
        encoder: makes the conditions.
        threads: of a decoder of latents.

    Raises:
        InputError: the model, its sampler or its conditions cannot do what the job asks for.
    """

    def __init__(
        self, session: StepSession, bundle: Bundle, job: Job, encoder: Encoder, *, threads: int | None = None
    ) -> None:
        self._session = session
        self._model = bundle.pipeline
        self._job = job
        options = SamplingOptions(
            sampler=job.sampler,
            steps=job.steps,
            eta=job.eta,
            guidance=job.guidance,
            guidance_rescale=job.guidance_rescale,
        )
        self._maker = SamplingMaker(bundle.pipeline, bundle.scheduler_config(), options, encoder)
        self._backend = made_by(session.describe(), job.precision)
        self._version = installed_version() or "unknown"
        # All that the first batch would be refused for: a job that is written down can be made.
        check_denoising(session, self._maker.make([job.seed], [job.label]), job.batch_size)
        self._decoder = open_decoder(bundle, str(session.describe()["backend"]), threads=threads)
        to_pictures(np.zeros((1, *self.shape), np.float32), self._model)  # refuses what no picture can hold

    @property
    def shape(self) -> tuple[int, int, int]:
        """[C, H, W] of a picture."""
        return self._model.picture_shape or self._model.sample_shape

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
        prompts = [self._job.label] * size
        seeds = range(self._job.seed + first, self._job.seed + first + size)
        samples = denoise(self._session, self._maker.make(seeds, prompts, first=first), batch_size=size)
        encoder = self._maker.encoder
        captions = encoder.captions(prompts, first=first)
        negatives = encoder.negatives(prompts, first=first)
        labels = encoder.numbers(prompts, first=first).tolist() if isinstance(encoder, LabelEncoder) else [None] * size
        return [
            self._picture(first + row, pixels, labels[row], captions[row], negatives[row])
            for row, pixels in enumerate(to_pictures(self._decoder.decode(samples), self._model))
        ]

    def _picture(
        self, index: int, pixels: NDArray[np.uint8], label: int | None, caption: str | None, negative: str | None
    ) -> Picture:
        metadata = ImageMetadata(
            version=self._version,
            bundle_id=self._job.bundle_id,
            seed=self._job.seed + index,
            sampler=self._job.sampler,
            steps=self._job.steps,
            eta=self._job.eta,
            guidance=self._job.guidance,
            guidance_rescale=self._job.guidance_rescale,
            label=caption,
            negative_prompt=negative,
            backend=self._backend,
        )
        return Picture(index, pixels, label, metadata)
