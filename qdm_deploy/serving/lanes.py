"""A batch split over several sessions that run at the same time, because a CPU's cores work better apart.

The layers of a small U-Net are too short for two threads to share one well. Two sessions of one thread, each with half
of the batch, wait for each other once a step instead of once a layer. A single image has nothing to split: it goes to
a session with all threads.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from qdm_deploy.serving.batch import BatchRunner
from qdm_deploy.serving.scheduler import Image

__all__ = ["Lanes", "Runner", "lane_rows", "split"]


class Runner(Protocol):
    """Takes one step with some images."""

    def run(self, images: Sequence[Image]) -> int:
        """Take one step with each image and return how many rows were padding; an image that could not stays as is."""
        ...


def lane_rows(max_rows: int, lanes: int) -> int:
    """Rows of the largest part when a batch of ``max_rows`` rows is split over ``lanes`` and no image is torn."""
    share = -(-max_rows // lanes)
    return min(share + share % 2, max_rows)


def split(images: Sequence[Image], lanes: int) -> list[list[Image]]:
    """Parts of nearly the same number of rows, one for each lane; guided images, which take two rows, come first."""
    parts: list[list[Image]] = [[] for _ in range(lanes)]
    rows = [0] * lanes
    for image in sorted(images, key=lambda image: -image.job.rows_each):
        lightest = rows.index(min(rows))
        parts[lightest].append(image)
        rows[lightest] += image.job.rows_each
    return parts


class Lanes:
    """Runs every part of a batch in a thread of its own; native code leaves the interpreter to the others meanwhile.

    Args:
        lanes: at least two, on sessions of their own.
        alone: for a single image; None gives it to a lane.
    """

    def __init__(self, lanes: Sequence[BatchRunner], alone: BatchRunner | None) -> None:
        self._lanes = lanes
        self._alone = alone
        self._threads = ThreadPoolExecutor(len(lanes), "lane")

    def run(self, images: Sequence[Image]) -> int:
        """Take one step with each image and return how many rows were padding.

        Raises:
            Exception: what the first lane that failed raised; the images of the other lanes have moved.
        """
        if self._alone is not None and len(images) == 1:
            return self._alone.run(images)
        running = [
            self._threads.submit(lane.run, part)
            for lane, part in zip(self._lanes, split(images, len(self._lanes)), strict=True)
            if part
        ]
        # All of them end before any error is raised: a lane must not run on into the next step.
        errors = [future.exception() for future in running]
        for error in errors:
            if error is not None:
                raise error
        return sum(future.result() for future in running)
