"""What every route works with: the engine, the settings, the metrics, and pictures made off the event loop."""

import asyncio
import base64
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.artifacts.record import installed_version
from qdm_deploy.components.pictures import ImageMetadata, encode_picture, made_by, to_pictures
from qdm_deploy.serving.contract import Engine
from qdm_deploy.serving.http.bodies import GenerationBody
from qdm_deploy.serving.http.metrics import Metrics
from qdm_deploy.serving.http.settings import HttpSettings
from qdm_deploy.serving.http.translate import Makers, Order, order_of

__all__ = ["Service"]


def _now() -> int:
    return int(datetime.now(UTC).timestamp())


@dataclass(frozen=True, eq=False)
class Service:
    """One engine behind HTTP."""

    engine: Engine
    settings: HttpSettings
    metrics: Metrics
    makers: Makers
    created: int = field(default_factory=_now)
    # Pictures are encoded beside the event loop, one request at a time: a burst of them must not slow the steps down.
    _encoder: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "pictures"))
    # So are prompts, one after the other.
    _reader: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "prompts"))

    def now(self) -> int:
        """Seconds since 1970, as OpenAI's ``created`` counts them."""
        return _now()

    async def order(self, body: GenerationBody, request_id: str) -> Order:
        """What a body asks for.

        Raises:
            ApiError: it cannot be done.
        """
        given = (body, self.engine.model, self.settings, request_id, self.makers)
        if not self.engine.model.text_encoders:
            return order_of(*given)
        return await asyncio.get_running_loop().run_in_executor(self._reader, order_of, *given)

    async def pictures(self, order: Order, images: Sequence[int], samples: NDArray[np.float32]) -> list[str]:
        """Pictures as base64 of encoded files.

        Args:
            order: what was asked for.
            images: which image of the request each sample is.
            samples: [N, C, H, W] float32.
        """
        start = time.perf_counter()
        loop = asyncio.get_running_loop()
        made = await loop.run_in_executor(self._encoder, self._encode, order, images, samples)
        self.metrics.decoded(time.perf_counter() - start)
        return made

    def close(self) -> None:
        """Give the threads back."""
        for executor in (self._encoder, self._reader):
            executor.shutdown(wait=False, cancel_futures=True)

    def _encode(self, order: Order, images: Sequence[int], samples: NDArray[np.float32]) -> list[str]:
        encoded = []
        decoded = self.makers.decoder.decode(samples)
        for image, picture in zip(images, to_pictures(decoded, self.engine.model), strict=True):
            metadata = self._metadata(order, image)
            data = encode_picture(picture, order.output_format, quality=order.quality, metadata=metadata)
            encoded.append(base64.b64encode(data).decode("ascii"))
        return encoded

    def _metadata(self, order: Order, image: int) -> ImageMetadata:
        request = order.request
        return ImageMetadata(
            version=installed_version() or "unknown",
            bundle_id=self.settings.bundle_id,
            seed=request.seeds[image],
            sampler=request.sampler,
            steps=request.steps,
            eta=request.eta,
            guidance=request.guidance,
            label=order.captions[image],
            negative_prompt=order.negatives[image],
            backend=made_by(self.engine.state.backend, self.settings.precision),
        )
