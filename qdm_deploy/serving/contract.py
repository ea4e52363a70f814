"""What the HTTP side and the denoising engine say to each other.

A request holds everything that decides its images; nothing about it depends on what else is running. Each request that
is admitted ends in exactly one way: finished, or one ``GenerationFailed``.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.artifacts.pipeline_spec import PipelineSpec
from qdm_deploy.errors import QdmError
from qdm_deploy.samplers.conditioning import Conditioning

__all__ = [
    "AdmissionRefused",
    "Engine",
    "EngineState",
    "FailureReason",
    "Finished",
    "Generation",
    "GenerationFailed",
    "GenerationRequest",
    "Observer",
    "Preview",
    "RefusalReason",
]

RefusalReason = Literal["queue_full", "draining", "loading", "engine_dead"]
FailureReason = Literal["cancelled", "deadline", "engine_error", "not_finite", "shutdown"]


@dataclass(frozen=True, eq=False)
class GenerationRequest:
    """Some images of one description; each image denoises for itself.

    Attributes:
        request_id: unique among the requests that are alive.
        seeds: one image each, 0 .. 2**63 - 1.
        sampler: one of ``qdm_deploy.samplers.SAMPLERS``.
        steps: denoising steps.
        eta: noise of the ddim sampler.
        guidance: scale of classifier-free guidance; any other value than 1 takes two rows an image.
        guidance_rescale: how far guided outputs take back the spread of unguided ones.
        conditioning: of the images, as an encoder made it.
        deadline: seconds from submission after which the request fails; None is never.
        previews: how many intermediate x0 of each image are wanted, spread evenly over its steps.
    """

    request_id: str
    seeds: tuple[int, ...]
    sampler: str = "ddim"
    steps: int = 50
    eta: float = 0.0
    guidance: float = 1.0
    guidance_rescale: float = 0.0
    conditioning: Conditioning = field(default_factory=Conditioning)
    deadline: float | None = None
    previews: int = 0


@dataclass(frozen=True, eq=False)
class Preview:
    """What one image looks like on its way: ``x0`` [C, H, W] float32 after ``step`` (from 1) of ``steps``."""

    image: int
    step: int
    steps: int
    x0: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Finished:
    """All images of a request: ``samples`` [N, C, H, W] float32 in the order of the seeds, and where the time went."""

    samples: NDArray[np.float32]
    queue_seconds: float
    seconds: float


class AdmissionRefused(QdmError):
    """The engine does not take the request now; the caller may try again after ``retry_after`` seconds."""

    exit_code = 75

    def __init__(self, reason: RefusalReason, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.reason: RefusalReason = reason
        self.retry_after = retry_after


class GenerationFailed(QdmError):
    """An admitted request ended without images."""

    def __init__(self, reason: FailureReason, message: str) -> None:
        super().__init__(message)
        self.reason: FailureReason = reason


class Generation(Protocol):
    """A request that was admitted."""

    @property
    def request(self) -> GenerationRequest:
        """What was asked for."""
        ...

    def previews(self) -> AsyncIterator[Preview]:
        """The previews as they come; ends when the request ends, however it ends."""
        ...

    async def result(self) -> Finished:
        """Wait for the images.

        Raises:
            GenerationFailed: the request ended in another way.
        """
        ...

    def cancel(self) -> None:
        """Give the request's rows back within one step; a request that has ended stays as it is."""
        ...


@dataclass(frozen=True)
class EngineState:
    """What the engine is doing.

    Attributes:
        phase: "loading" until the first step has run, "ready", "restarting" after the engine process died, "draining"
            after ``drain``, "dead" when it gave up or was closed.
        running_rows: rows that take part in the next step.
        max_rows: rows of the largest batch.
        waiting: admitted requests without a row; each that is alive runs or waits.
        max_waiting: requests that may wait, beside those that the next step will hold.
        running: requests with at least one row in the batch: id, step and steps of its furthest image, rows.
        restarts: times the engine process was started again.
        backend: ``StepSession.describe()``, or empty before the first load.
    """

    phase: Literal["loading", "ready", "restarting", "draining", "dead"]
    running_rows: int
    max_rows: int
    waiting: int
    max_waiting: int
    running: tuple[tuple[str, int, int, int], ...]
    restarts: int
    backend: dict[str, object]


class Observer(Protocol):
    """Told what happened, for metrics; every call comes from the event loop's thread and must return at once."""

    def stepped(self, rows: int, padding_rows: int, seconds: float) -> None:
        """One run of the session: rows that did work, rows that only filled the batch, wall time."""
        ...

    def refused(self, reason: RefusalReason) -> None:
        """A request was not admitted."""
        ...

    def ended(
        self, outcome: Literal["finished"] | FailureReason, images: int, queue_seconds: float, seconds: float
    ) -> None:
        """A request ended; ``images`` is 0 unless it finished."""
        ...

    def restarted(self) -> None:
        """The engine process was started again."""
        ...


class Engine(Protocol):
    """Continuous batching over one bundle. All methods are called from one event loop."""

    @property
    def model(self) -> PipelineSpec:
        """The model that it runs; known before ``start``."""
        ...

    @property
    def state(self) -> EngineState:
        """A snapshot."""
        ...

    def add_observer(self, observer: Observer) -> None:
        """Tell ``observer`` what happens from now on."""
        ...

    async def start(self) -> None:
        """Start the engine process and return when the first step has run.

        Raises:
            QdmError: the bundle or the backend cannot be used.
        """
        ...

    def submit(self, request: GenerationRequest) -> Generation:
        """Admit a request, or refuse it; never waits.

        Raises:
            InputError: the request does not fit the model, or can never fit the engine.
            AdmissionRefused: not now.
        """
        ...

    async def drain(self, timeout: float) -> None:
        """Admit nothing more, let what was admitted finish for up to ``timeout`` seconds, fail the rest, and close."""
        ...

    async def close(self) -> None:
        """Fail what is alive and end the engine process; closing twice is allowed."""
        ...
