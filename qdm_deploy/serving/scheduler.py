"""Which images take part in the next step: fairness, deadlines. No clock, no I/O, no numerics.

Capacity is counted in rows, and an image's rows (two when it is guided) are taken and given back together. The rule of
fairness: requests with images that have not started stand in a ring; whenever rows are free, the request in front
starts one image and goes to the back. So a request waits for at most one image of each request that stood in the ring
before it, however many images those want. The one in front is never passed over: a guided image that needs two rows
waits for them, and one row may stay empty meanwhile, or a stream of unguided images could starve it.
"""

from collections import deque
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.artifacts.step_interface import StepInterface
from qdm_deploy.samplers.sampling import Sampling
from qdm_deploy.serving.jobs import Job

__all__ = ["Image", "Scheduler"]


@dataclass(eq=False)
class Image:
    """One image on its way; its state is its own.

    Attributes:
        job: the request it belongs to.
        index: which of the request's images.
        sampling: what decides this one.
        state: by state input of the step graph, one row without the batch axis, after ``step`` steps.
        x0: [C, H, W] float32, the clean sample that the last step predicted; None before the first.
        step: steps taken.
    """

    job: Job
    index: int
    sampling: Sampling
    state: dict[str, NDArray[np.float32]]
    x0: NDArray[np.float32] | None = None
    step: int = 0

    @property
    def done(self) -> bool:
        """Whether it took all its steps."""
        return self.step >= self.job.steps


@dataclass(eq=False)
class _Request:
    job: Job
    started: int = 0
    finished: int = 0
    samples: NDArray[np.float32] | None = field(default=None, repr=False)


class Scheduler:
    """Holds every request from its admission to its end, and the rows of the batch.

    Args:
        max_rows: rows of the largest batch.
        interface: of the step graph.
    """

    def __init__(self, max_rows: int, interface: StepInterface) -> None:
        self.max_rows = max_rows
        self._interface = interface
        self._alive: dict[str, _Request] = {}
        self._ring: deque[_Request] = deque()
        self._running: list[Image] = []

    @property
    def running(self) -> tuple[Image, ...]:
        """The images that take part in the next step, in the order of their start."""
        return tuple(self._running)

    @property
    def running_rows(self) -> int:
        """Rows of ``running``."""
        return sum(image.job.rows_each for image in self._running)

    def running_requests(self) -> list[tuple[str, int, int, int]]:
        """Id, step and steps of its furthest image, and rows, of each request that has any."""
        found: dict[str, tuple[int, int, int]] = {}
        for image in self._running:
            step, _, rows = found.get(image.job.request_id, (0, 0, 0))
            found[image.job.request_id] = (max(step, image.step), image.job.steps, rows + image.job.rows_each)
        return [(request_id, *numbers) for request_id, numbers in found.items()]

    @property
    def alive(self) -> frozenset[str]:
        """Every request that has not ended."""
        return frozenset(self._alive)

    @property
    def waiting(self) -> int:
        """Requests that no image of has started."""
        return sum(request.started == 0 for request in self._ring)

    def submit(self, job: Job) -> None:
        """Take a request in; how many may wait is for the caller to bound (``Ledger``).

        Raises:
            ValueError: the id is alive, or an image needs more rows than there are.
        """
        if job.request_id in self._alive:
            raise ValueError(f"the request {job.request_id} is alive already")
        if job.rows_each > self.max_rows:
            raise ValueError(f"an image of {job.request_id} takes {job.rows_each} rows of {self.max_rows}")
        request = _Request(job)
        self._alive[job.request_id] = request
        self._ring.append(request)

    def end(self, request_id: str) -> bool:
        """Forget a request and give its rows back; False if it is not alive."""
        request = self._alive.pop(request_id, None)
        if request is None:
            return False
        if request in self._ring:
            self._ring.remove(request)
        self._running = [image for image in self._running if image.job is not request.job]
        return True

    def expire(self, now: float) -> list[str]:
        """End the requests whose deadline has come, and name them."""
        late = [
            request_id
            for request_id, request in self._alive.items()
            if request.job.deadline is not None and request.job.deadline <= now
        ]
        for request_id in late:
            self.end(request_id)
        return late

    def fill(self) -> tuple[Image, ...]:
        """Start images while rows are free, by the rule above, and return all that run."""
        free = self.max_rows - self.running_rows
        while self._ring and self._ring[0].job.rows_each <= free:
            request = self._ring.popleft()
            free -= request.job.rows_each
            self._running.append(self._start(request))
            if request.started < request.job.images:
                self._ring.append(request)
        return self.running

    def collect(self) -> list[tuple[str, NDArray[np.float32]]]:
        """Take out the images that are done; return the requests that thereby are, with samples [N, C, H, W]."""
        ended: list[tuple[str, NDArray[np.float32]]] = []
        for image in [image for image in self._running if image.done]:
            self._running.remove(image)
            request = self._alive[image.job.request_id]
            if request.samples is None:
                request.samples = np.empty((request.job.images, *self._interface.sample_shape), np.float32)
            request.samples[image.index] = image.state["sample"]
            request.finished += 1
            if request.finished == request.job.images:
                del self._alive[image.job.request_id]
                ended.append((image.job.request_id, request.samples))
        return ended

    def _start(self, request: _Request) -> Image:
        index = request.started
        request.started += 1
        sampling = request.job.sampling.take(slice(index, index + 1))
        state = {spec.name: np.zeros(spec.row_shape, np.float32) for spec in self._interface.of_role("state")}
        state["sample"] = sampling.start(self._interface.sample_shape)[0]
        return Image(request.job, index, sampling, state)
