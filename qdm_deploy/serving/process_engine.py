"""The engine in a process of its own, and the side of it that lives in the event loop.

The scheduler lives in the child, so that the steps never wait for this process: it may be busy with pictures or
clients. Here is the record of every admitted request, and this record alone decides its one outcome: what the child
says of a request that has ended here already is ignored.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from qdm_deploy.artifacts.bundle import Bundle
from qdm_deploy.artifacts.pipeline_spec import PipelineSpec
from qdm_deploy.child_process import Frame, error_of, frame
from qdm_deploy.errors import EnvironmentProblem, InputError, QdmError, ResourceProblem
from qdm_deploy.samplers import NoiseSchedule
from qdm_deploy.serving.contract import (
    AdmissionRefused,
    EngineState,
    FailureReason,
    Finished,
    GenerationFailed,
    GenerationRequest,
    Observer,
    Preview,
    RefusalReason,
)
from qdm_deploy.serving.engine_process import CHILD, EngineProcess
from qdm_deploy.serving.generation import LiveGeneration
from qdm_deploy.serving.jobs import JobMaker
from qdm_deploy.serving.ledger import Ledger
from qdm_deploy.serving.restarts import RestartPolicy
from qdm_deploy.serving.settings import Settings
from qdm_deploy.serving.wire import submission

__all__ = ["ProcessEngine"]

_LOG = logging.getLogger(__name__)
_DEAD_RETRY = 60.0


class ProcessEngine:
    """Continuous batching over one bundle, in a child process that is started again when it dies.

    A request none of whose images has started survives the child's death and runs in the next one; the others fail.

    Args:
        bundle: the bundle's folder; its files are hashed by the child, whenever it opens them.
        backend: as ``open_session`` takes it.
        precision: as ``open_session`` takes it.
        threads: CPU threads of the session; None takes the cores this process may use.
        max_rows: rows of the largest batch; a guided image takes two.
        max_waiting: requests that may wait for a row.
        lanes: sessions that share a batch and the threads, each with a copy of the weights; None takes two on a CPU
            with two threads, one on a GPU. With more than one there is a further session for an image that runs alone.
        deterministic: run every batch at one size, filled up where there are fewer rows, so that an image has the same
            bits whatever runs beside it.
        step_timeout: seconds without a word of the child while it has work, after which it is killed.
        load_timeout: seconds for the child to open the bundle, build engines on a GPU, and run its first steps.
        restarts: when to start the child again; None takes the defaults of ``RestartPolicy``.

    Raises:
        BundleError: there is no bundle that this version can read.
        InputError: a number is out of range.
    """

    _program: Sequence[str] = CHILD  # tests run programs of their own

    def __init__(
        self,
        bundle: Path,
        *,
        backend: str = "auto",
        precision: Literal["int8", "float"] = "int8",
        threads: int | None = None,
        max_rows: int = 8,
        max_waiting: int = 64,
        lanes: int | None = None,
        deterministic: bool = False,
        step_timeout: float = 60.0,
        load_timeout: float = 1800.0,
        restarts: RestartPolicy | None = None,
    ) -> None:
        if max_rows < 1 or max_waiting < 0:
            raise InputError(f"max_rows={max_rows}, max_waiting={max_waiting}: give at least 1 row and 0 places")
        if not (step_timeout > 0 and load_timeout > 0):
            raise InputError(f"step_timeout={step_timeout}, load_timeout={load_timeout}: give seconds, more than 0")
        opened = Bundle.open(bundle, check="sizes")
        self._model = opened.pipeline
        self._schedule = NoiseSchedule.from_config(opened.scheduler_config())
        self._settings = Settings(str(bundle), backend, precision, threads, max_rows, lanes, deterministic)
        self._maker = JobMaker(self._model, self._schedule, max_rows)
        self._step_timeout = step_timeout
        self._load_timeout = load_timeout
        self._policy = restarts or RestartPolicy()
        self._phase: Literal["loading", "ready", "restarting", "dead"] = "loading"
        self._draining = False
        self._backend: dict[str, object] = {}
        self._restarts = 0
        self._observers: list[Observer] = []
        self._ledger = Ledger(max_rows, max_waiting)
        self._process: EngineProcess | None = None
        self._task: asyncio.Task[None] | None = None
        self._loaded: asyncio.Future[None] | None = None
        self._empty = asyncio.Event()
        self._empty.set()
        self._heard = 0.0
        self._idle = True
        self._hung = False

    # ------------------------------------------------------------------------------------------------ the contract

    @property
    def model(self) -> PipelineSpec:
        """The model that it runs."""
        return self._model

    @property
    def pid(self) -> int | None:
        """Process id of the child while there is one."""
        return None if self._process is None else self._process.pid

    @property
    def state(self) -> EngineState:
        """A snapshot."""
        ledger = self._ledger
        return EngineState(
            phase="draining" if self._draining and self._phase != "dead" else self._phase,
            running_rows=ledger.running_rows,
            max_rows=ledger.max_rows,
            waiting=ledger.waiting,
            max_waiting=ledger.max_waiting,
            running=tuple((request_id, *numbers) for request_id, numbers in ledger.running.items()),
            restarts=self._restarts,
            backend=self._backend,
        )

    def add_observer(self, observer: Observer) -> None:
        """Tell ``observer`` what happens from now on."""
        self._observers.append(observer)

    async def start(self) -> None:
        """Start the engine process and return when the first step has run.

        Raises:
            QdmError: the bundle or the backend cannot be used; the engine is dead then.
            RuntimeError: it was started before.
        """
        if self._task is not None or self._phase == "dead":
            raise RuntimeError("this engine was started or closed before; make another")
        self._loaded = asyncio.get_running_loop().create_future()
        self._loaded.add_done_callback(lambda future: future.exception())
        self._task = asyncio.create_task(self._supervise())
        await asyncio.shield(self._loaded)

    def submit(self, request: GenerationRequest) -> LiveGeneration:
        """Admit a request, or refuse it; never waits.

        Raises:
            InputError: the request does not fit the model, or can never fit the engine.
            AdmissionRefused: not now.
        """
        ledger = self._ledger
        self._refuse_by_phase()
        if request.request_id in ledger.alive:
            raise InputError(f"the request id {request.request_id!r} is in use; give each request its own")
        # A flood is turned away before anything is computed for it.
        if ledger.full_for(1 if request.guidance == 1.0 else 2):
            message = f"{ledger.max_waiting} requests wait already; try again later"
            self._refuse("queue_full", message, ledger.retry_after())
        job = self._maker.job(request)
        generation = LiveGeneration(request, job.rows_each, time.monotonic(), self._cancelled)
        if request.deadline is not None:
            loop = asyncio.get_running_loop()
            generation.timer = loop.call_later(request.deadline, self._late, generation)
        ledger.alive[request.request_id] = generation
        self._empty.clear()
        self._hand_over(generation)
        return generation

    async def drain(self, timeout: float) -> None:
        """Admit nothing more, let what was admitted finish for up to ``timeout`` seconds, fail the rest, and close."""
        self._draining = True
        try:
            async with asyncio.timeout(timeout):
                await self._empty.wait()
        except TimeoutError:
            _LOG.warning("%d requests did not finish within %g s of draining", len(self._ledger.alive), timeout)
        await self.close()

    async def close(self) -> None:
        """Fail what is alive and end the engine process; closing twice is allowed."""
        self._phase = "dead"
        self._fail_all("shutdown", "the engine was shut down before the images were finished")
        if self._loaded is not None and not self._loaded.done():
            self._loaded.set_exception(EnvironmentProblem("the engine was closed while it loaded"))
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    # ------------------------------------------------------------------------------------------------ admission

    def _refuse_by_phase(self) -> None:
        if self._phase == "dead":
            self._refuse("engine_dead", "the engine has given up or was closed", _DEAD_RETRY)
        if self._draining:
            self._refuse("draining", "the server is shutting down", 5.0)
        if self._phase != "ready":
            what = "is loading" if self._phase == "loading" else "is being restarted"
            self._refuse("loading", f"the engine {what}", 5.0)

    def _refuse(self, reason: RefusalReason, message: str, retry_after: float) -> None:
        self._tell(lambda observer: observer.refused(reason))
        raise AdmissionRefused(reason, message, retry_after)

    def _hand_over(self, generation: LiveGeneration) -> None:
        if self._process is not None and self._phase == "ready":
            if self._idle:
                self._idle = False
                self._heard = time.monotonic()  # it owes us a word from now on
            deadline = generation.request.deadline
            until = None if deadline is None else generation.submitted + deadline
            self._process.write(submission(generation.request, until))

    # ------------------------------------------------------------------------------------------------ outcomes

    def _cancelled(self, generation: LiveGeneration) -> None:
        self._give_rows_back(generation)
        self._fail(generation, "cancelled", "the request was cancelled")

    def _late(self, generation: LiveGeneration) -> None:
        # The child looks at the deadline before each step; here it also comes inside a long step, or between two
        # children.
        self._give_rows_back(generation)
        self._fail(generation, "deadline", f"not finished within {generation.request.deadline} s")

    def _give_rows_back(self, generation: LiveGeneration) -> None:
        if self._process is not None:
            self._process.write(frame("cancel", request_id=generation.request.request_id))

    def _fail(self, generation: LiveGeneration, reason: FailureReason, message: str) -> None:
        self._end(generation, reason, GenerationFailed(reason, message))

    def _fail_all(self, reason: FailureReason, message: str) -> None:
        for generation in list(self._ledger.alive.values()):
            self._fail(generation, reason, message)

    def _end(
        self,
        generation: LiveGeneration,
        outcome: Literal["finished"] | FailureReason,
        result: Finished | GenerationFailed,
    ) -> None:
        """The one place where a request ends."""
        request = generation.request
        self._ledger.remove(generation)
        if not self._ledger.alive:
            self._empty.set()
        generation.end(result)
        seconds = time.monotonic() - generation.submitted
        queued = seconds if generation.started is None else generation.started - generation.submitted
        images = len(request.seeds) if outcome == "finished" else 0
        self._tell(lambda observer: observer.ended(outcome, images, queued, seconds))

    def _tell(self, call: Callable[[Observer], None]) -> None:
        for observer in self._observers:
            call(observer)

    # ------------------------------------------------------------------------------------------------ the child

    async def _supervise(self) -> None:
        """Keep a child running until the engine is closed or gives up."""
        try:
            while True:
                problem = await self._live_once()
                was_loaded = self._loaded is not None and self._loaded.done()
                wait = self._policy.failed(time.monotonic()) if was_loaded else None
                self._phase = "dead" if wait is None else "restarting"
                self._fail_started(str(problem))
                if wait is None:
                    self._give_up(problem)
                    return
                _LOG.error("%s; it is started again in %g s", problem, wait)
                await asyncio.sleep(wait)
                self._restarts += 1
                self._tell(lambda observer: observer.restarted())
        except Exception as error:  # whatever it is, nobody may wait for ever
            _LOG.exception("the supervision of the engine process failed")
            self._give_up(QdmError(f"the supervision of the engine process failed: {error}"))
            raise

    async def _live_once(self) -> QdmError:
        """Start a child and serve until it is gone; why it went."""
        try:
            process = await EngineProcess.start(self._settings, self._program)
        except OSError as error:
            return ResourceProblem(f"the engine process cannot be started: {error}")
        watch: asyncio.Task[None] | None = None
        self._hung = False
        try:
            async with asyncio.timeout(self._load_timeout):
                while (received := await process.read())[0]["kind"] == "log":
                    self._take(received)
            header, _ = received
            if header["kind"] == "error":
                return error_of(header)
            self._ready(process, header)
            watch = asyncio.create_task(self._watch(process))
            while True:
                self._take(await process.read())
        except EOFError:
            if self._hung:
                return EnvironmentProblem(f"a denoising step hung for more than {self._step_timeout:g} s")
            return EnvironmentProblem(await process.how_it_ended())
        except TimeoutError:
            return EnvironmentProblem(f"the engine process did not load the bundle within {self._load_timeout:g} s")
        finally:
            self._process = None
            if self._phase == "ready":
                self._phase = "restarting"  # at once: the end of a process may take long
            if watch is not None:
                watch.cancel()
            await process.end()

    def _ready(self, process: EngineProcess, header: dict[str, Any]) -> None:
        self._process = process
        self._backend = header["backend"]
        self._settings = self._settings.chosen(str(header["backend"]["backend"]))
        self._ledger.max_rows = header["max_rows"]
        self._maker = JobMaker(self._model, self._schedule, header["max_rows"])
        self._phase = "ready"
        self._heard = time.monotonic()
        self._idle = True
        for generation in self._ledger.alive.values():
            self._hand_over(generation)
        if self._loaded is not None and not self._loaded.done():
            self._loaded.set_result(None)

    async def _watch(self, process: EngineProcess) -> None:
        """Kill a child that has work and says nothing."""
        pause = min(self._step_timeout / 4, 1.0)
        suspected = False
        while True:
            await asyncio.sleep(pause)
            # A step may hang for a request that has ended here by its deadline: the child is busy all the same.
            busy = bool(self._ledger.alive) or not self._idle
            silent = busy and time.monotonic() - self._heard > self._step_timeout
            # Not at the first sight: if this loop itself was held up, what the child said lies unread.
            if silent and suspected:
                self._hung = True
                process.kill()
                return
            suspected = silent

    def _take(self, received: Frame) -> None:
        """What the child says."""
        self._heard = time.monotonic()
        header, arrays = received
        kind = header["kind"]
        if kind == "log":
            logging.getLogger(header["name"]).log(header["level"], "%s", header["message"])
            return
        if kind == "running":
            self._idle = not header["requests"]
            self._ledger.take_running(header["requests"], self._heard)
            return
        if kind == "stepped":
            rows, padding, seconds = header["rows"], header["padding"], header["seconds"]
            self._tell(lambda observer: observer.stepped(rows, padding, seconds))
            return
        generation = self._ledger.alive.get(header["request_id"])
        if generation is None:
            return  # it ended here while this was on its way
        if kind == "shown":
            generation.show(Preview(header["image"], header["step"], header["steps"], arrays[0]))
        elif kind == "done":
            now = time.monotonic()
            started = generation.started or now
            self._ledger.served(now - started)
            queued = started - generation.submitted
            self._end(generation, "finished", Finished(arrays[0], queued, now - generation.submitted))
        else:
            self._fail(generation, header["reason"], header["message"])

    def _fail_started(self, why: str) -> None:
        self._ledger.running = {}
        for generation in list(self._ledger.alive.values()):
            if generation.started is not None:
                self._fail(generation, "engine_error", f"{why}; the images were lost, and the request can be repeated")

    def _give_up(self, problem: QdmError) -> None:
        self._phase = "dead"
        _LOG.critical("the engine gives up: %s", problem)
        self._fail_all("engine_error", f"the engine has given up: {problem}")
        if self._loaded is not None and not self._loaded.done():
            self._loaded.set_exception(problem)
