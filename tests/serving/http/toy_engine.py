"""A small engine in this process that really denoises, with numpy, and fails on demand; also a server of its own.

Run as a program it serves itself: ``python toy_engine.py '{"port": 0}'``, with fields of ``HttpSettings`` and arguments
of ``ToyEngine``.
"""

import asyncio
import json
import sys
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from qdm_deploy.artifacts.pipeline_spec import Denoiser, LabelTable, PipelineSpec
from qdm_deploy.artifacts.step_interface import StepInterface, TensorSpec
from qdm_deploy.components.sampling import table_for
from qdm_deploy.errors import InputError
from qdm_deploy.samplers import NoiseSchedule, apply_step, initial_noise, step_noise
from qdm_deploy.samplers.columns import COEFFICIENTS, HISTORY
from qdm_deploy.serving.contract import (
    AdmissionRefused,
    EngineState,
    FailureReason,
    Finished,
    GenerationFailed,
    GenerationRequest,
    Observer,
    Preview,
)

SHAPE = (1, 8, 10)
LABELLED = PipelineSpec(
    name="toy",
    components=(
        Denoiser(
            interface=StepInterface.of(
                SHAPE, [TensorSpec(name="class_labels", dtype="int64")], coefficients=len(COEFFICIENTS)
            ),
            num_train_timesteps=100,
            limits={"class_labels": 4},
        ),
        LabelTable(input="class_labels", num_classes=3, labels=("shirt", "bag", "boot"), null_label=3),
    ),
)
PLAIN = PipelineSpec(
    name="plain",
    components=(
        Denoiser(interface=StepInterface.of((3, 8, 8), coefficients=len(COEFFICIENTS)), num_train_timesteps=100),
    ),
)
SCHEDULE = NoiseSchedule.from_config(
    {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": 100,
        "beta_start": 0.001,
        "beta_end": 0.2,
        "beta_schedule": "linear",
        "prediction_type": "epsilon",
        "clip_sample": True,
    }
)


@dataclass(eq=False)
class Image:
    index: int
    sample: Any
    x0: Any
    history: Any
    step: int = 0


@dataclass(eq=False)
class Run:
    """One admitted request; also its ``Generation``."""

    request: GenerationRequest
    engine: "ToyEngine"
    table: Any
    images: list[Image]
    submitted: float = field(default_factory=time.perf_counter)
    started: float | None = None
    outcome: asyncio.Future[Finished] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    shown: asyncio.Queue[Preview | None] = field(default_factory=asyncio.Queue)

    @property
    def rows(self) -> int:
        each = 1 if self.request.guidance == 1.0 else 2
        return each * sum(image.step < self.request.steps for image in self.images)

    async def previews(self) -> AsyncIterator[Preview]:
        while (preview := await self.shown.get()) is not None:
            yield preview

    async def result(self) -> Finished:
        return await asyncio.shield(self.outcome)

    def cancel(self) -> None:
        self.engine.end(self, "cancelled")


class ToyEngine:
    """See ``Engine``.

    Attributes:
        fault: the reason with which all running requests fail at the next step; then it is None again.
        loaded: what ``start`` waits for.
        steps_run: steps of images that were computed.
    """

    def __init__(
        self,
        model: PipelineSpec = LABELLED,
        *,
        max_rows: int = 8,
        max_waiting: int = 16,
        step_seconds: float = 0.001,
        load_seconds: float = 0.0,
    ) -> None:
        self.model = model
        self.max_rows, self.max_waiting = max_rows, max_waiting
        self.step_seconds, self.load_seconds = step_seconds, load_seconds
        self.phase: Any = "loading"
        self.fault: FailureReason | None = None
        self.start_error: Exception | None = None
        self.steps_run = 0
        self.running: list[Run] = []
        self.queue: deque[Run] = deque()
        self._observers: list[Observer] = []
        self._loop: asyncio.Task[None] | None = None

    @property
    def state(self) -> EngineState:
        running = tuple(
            (run.request.request_id, max(i.step for i in run.images), run.request.steps, run.rows)
            for run in self.running
        )
        rows = sum(run.rows for run in self.running)
        backend = {"backend": "numpy", "version": np.__version__} if self.phase != "loading" else {}
        return EngineState(
            self.phase, rows, self.max_rows, len(self.queue), self.max_waiting, running, 0, dict(backend)
        )

    def add_observer(self, observer: Observer) -> None:
        self._observers.append(observer)

    async def start(self) -> None:
        await asyncio.sleep(self.load_seconds)
        if self.start_error is not None:
            self.phase = "dead"
            raise self.start_error
        self.phase = "ready"
        self._loop = asyncio.ensure_future(self._steps())

    def submit(self, request: GenerationRequest) -> Run:
        each = 1 if request.guidance == 1.0 else 2
        if each * len(request.seeds) > self.max_rows:
            raise InputError(f"{each * len(request.seeds)} rows do not fit {self.max_rows}")
        reason = {"loading": "loading", "draining": "draining", "dead": "engine_dead"}.get(self.phase)
        if reason is None and len(self.queue) >= self.max_waiting:
            reason = "queue_full"
        if reason is not None:
            for observer in self._observers:
                observer.refused(reason)  # type: ignore[arg-type]
            raise AdmissionRefused(reason, f"refused: {reason}", 1.5)  # type: ignore[arg-type]
        start = initial_noise(request.seeds, self.model.sample_shape)
        table = table_for(self.model.denoiser, SCHEDULE, request.sampler, request.steps, request.eta)
        empty = np.zeros_like(start[:1])
        images = [Image(i, start[i : i + 1], empty, np.repeat(empty, HISTORY, axis=1)) for i in range(len(start))]
        run = Run(request, self, table, images)
        self.queue.append(run)
        return run

    def end(self, run: Run, outcome: FailureReason | None) -> None:
        """``None``: finished."""
        if run.outcome.done():
            return
        now = time.perf_counter()
        queued, seconds = (run.started or now) - run.submitted, now - run.submitted
        if outcome is None:
            run.outcome.set_result(Finished(np.concatenate([i.sample for i in run.images]), queued, seconds))
        else:
            run.outcome.set_exception(GenerationFailed(outcome, f"ended: {outcome}"))
            run.outcome.exception()  # whoever left does not look at it
        run.shown.put_nowait(None)
        for place in (self.running, self.queue):
            if run in place:
                place.remove(run)
        for observer in self._observers:
            observer.ended(outcome or "finished", 0 if outcome else len(run.images), queued, seconds)

    async def drain(self, timeout: float) -> None:
        self.phase = "draining"
        until = time.perf_counter() + timeout
        while (self.running or self.queue) and time.perf_counter() < until:
            await asyncio.sleep(0.005)
        await self.close()

    async def close(self) -> None:
        for run in [*self.running, *self.queue]:
            self.end(run, "shutdown")
        self.phase = "dead"
        if self._loop is not None:
            self._loop.cancel()

    async def _steps(self) -> None:
        while True:
            await asyncio.sleep(self.step_seconds)
            now = time.perf_counter()
            for run in [*self.running, *self.queue]:
                deadline = run.request.deadline
                if deadline is not None and now - run.submitted > deadline:
                    self.end(run, "deadline")
            while self.queue and sum(run.rows for run in self.running) + self.queue[0].rows <= self.max_rows:
                self.running.append(self.queue.popleft())
                self.running[-1].started = now
            if not self.running:
                continue
            if self.fault is not None:
                for run in list(self.running):
                    self.end(run, self.fault)
                self.fault = None
            rows = sum(run.rows for run in self.running)
            for run in list(self.running):
                self._advance(run)
            for observer in self._observers:
                observer.stepped(rows, self.max_rows - rows, time.perf_counter() - now)

    def _advance(self, run: Run) -> None:
        request = run.request
        for image in run.images:
            labels = request.conditioning.own.get("class_labels", np.zeros(99))
            seed, label = request.seeds[image.index], float(labels[image.index])
            noise = step_noise([seed], image.step, self.model.sample_shape)
            output = (0.3 * image.sample + 0.2 * (label - 1)).astype(np.float32)
            row = run.table.coefficients[image.step : image.step + 1]
            image.sample, image.x0, image.history = apply_step(row, image.sample, output, image.history, noise)
            image.step += 1
            self.steps_run += 1
            wanted = {round(k * request.steps / (request.previews + 1)) for k in range(1, request.previews + 1)}
            if image.step in wanted and image.step < request.steps:
                run.shown.put_nowait(Preview(image.index, image.step, request.steps, image.x0[0].astype(np.float32)))
        if all(image.step == request.steps for image in run.images):
            self.end(run, None)


def main() -> int:
    from qdm_deploy.serving.http.server import run_server
    from qdm_deploy.serving.http.settings import HttpSettings

    given = json.loads(sys.argv[1]) if len(sys.argv) > 1 else {}
    of_http = {key: given.pop(key) for key in list(given) if key in {f.name for f in fields(HttpSettings)}}
    model = PLAIN if given.pop("plain", False) else LABELLED
    engine = ToyEngine(model, **given)
    return run_server(engine, HttpSettings(**of_http), on_listening=lambda url: print(url, flush=True))


if __name__ == "__main__":
    sys.exit(main())
