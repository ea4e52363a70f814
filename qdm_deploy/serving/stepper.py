"""Scheduler and session together: the engine without its process. One ``begin`` and one ``run`` make a step."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.serving.contract import FailureReason
from qdm_deploy.serving.lanes import Runner
from qdm_deploy.serving.scheduler import Image, Scheduler

__all__ = ["Done", "EngineBroken", "Failed", "Happened", "Shown", "Stepped", "Stepper"]

_LOG = logging.getLogger(__name__)
_BAD_STEPS = 3


class EngineBroken(Exception):
    """The session fails whatever it is given: the process that holds it must go."""


@dataclass(frozen=True)
class Stepped:
    """A run of the session: rows that did work, rows that only filled the batch, wall time."""

    rows: int
    padding: int
    seconds: float


@dataclass(frozen=True, eq=False)
class Shown:
    """x0 [C, H, W] float32 of an image after ``step`` of ``steps``."""

    request_id: str
    image: int
    step: int
    steps: int
    x0: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Done:
    """A request ended with its images, [N, C, H, W] float32."""

    request_id: str
    samples: NDArray[np.float32]


@dataclass(frozen=True)
class Failed:
    """A request ended without images."""

    request_id: str
    reason: FailureReason
    message: str


Happened = Stepped | Shown | Done | Failed


class Stepper:
    """Runs what the scheduler holds, step by step.

    Args:
        scheduler: which images run.
        runner: how they run.
    """

    def __init__(self, scheduler: Scheduler, runner: Runner) -> None:
        self.scheduler = scheduler
        self._runner = runner
        self._without_success = 0
        self._failed_batches = 0

    def begin(self, now: float) -> list[Happened]:
        """Before a step: end what is late, start what fits."""
        late: list[Happened] = [
            Failed(request_id, "deadline", "the deadline came before the images were finished")
            for request_id in self.scheduler.expire(now)
        ]
        self.scheduler.fill()
        return late

    def run(self) -> list[Happened]:
        """One step with every image that runs; what came of it.

        A run that fails is repeated for each request by itself, so that only the one that makes it fail is failed.

        Raises:
            MemoryError: there is no memory for this batch.
            EngineBroken: several steps after each other nothing could be run, or only without a batch.
        """
        images = self.scheduler.running
        if not images:
            return []
        start = time.perf_counter()
        before = [image.step for image in images]
        happened: list[Happened] = []
        padding = 0
        try:
            padding = self._runner.run(images)
        except MemoryError:
            raise
        except Exception:  # noqa: BLE001 - backends' errors share no base class
            _LOG.exception("a batch of %d images failed; its requests are run one by one", len(images))
            # One lane may have moved its part although another failed.
            waiting = [image for image, step in zip(images, before, strict=True) if image.step == step]
            failed = self._one_by_one(waiting)
            happened += failed
            self._failed_batches = 0 if failed else self._failed_batches + 1
        else:
            self._failed_batches = 0
        moved = [image for image, step in zip(images, before, strict=True) if image.step > step]
        self._without_success = 0 if moved else self._without_success + 1
        if self._without_success >= _BAD_STEPS:
            raise EngineBroken(f"{self._without_success} steps after each other failed for every request")
        if self._failed_batches >= _BAD_STEPS:
            # Native code that is out of memory says so in many ways; going on one by one would be slow for ever.
            raise EngineBroken(f"{self._failed_batches} batches after each other failed, and no request of them alone")
        happened += self._fail_not_finite(moved)
        alive = self.scheduler.alive
        for image in moved:
            if image.job.request_id in alive and image.step in image.job.preview_after:
                happened.append(_preview(image))
        happened += [Done(request_id, samples) for request_id, samples in self.scheduler.collect()]
        rows = sum(image.job.rows_each for image in moved)
        happened.append(Stepped(rows, padding, time.perf_counter() - start))
        return happened

    def _one_by_one(self, images: Sequence[Image]) -> list[Happened]:
        failed: list[Happened] = []
        for request_id in dict.fromkeys(image.job.request_id for image in images):
            try:
                self._runner.run([image for image in images if image.job.request_id == request_id])
            except MemoryError:
                raise
            except Exception as error:  # noqa: BLE001 - as above
                _LOG.exception("the request %s fails by itself", request_id)
                self.scheduler.end(request_id)
                failed.append(Failed(request_id, "engine_error", f"a denoising step failed: {type(error).__name__}"))
        return failed

    def _fail_not_finite(self, images: Sequence[Image]) -> list[Happened]:
        failed: list[Happened] = []
        for image in images:
            # What the sampler remembers enters the next step, so it counts as well.
            if all(np.isfinite(values).all() for values in image.state.values()):
                continue
            if self.scheduler.end(image.job.request_id):
                message = f"image {image.index} became NaN or infinite in step {image.step}"
                failed.append(Failed(image.job.request_id, "not_finite", message))
        return failed


def _preview(image: Image) -> Shown:
    shown = image.state["sample"] if image.x0 is None else image.x0
    return Shown(image.job.request_id, image.index, image.step, image.job.steps, shown.copy())
