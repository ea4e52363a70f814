"""The engine process: opens the bundle, then steps as long as there is work, and tells its parent what happened.

See ``qdm_deploy.child_process`` for how it is started and how it ends with its parent. It ends by itself rather than go
on with a session that fails whatever it is given.
"""

import logging
import queue
import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from qdm_deploy.artifacts.bundle import Bundle
from qdm_deploy.child_process import Frame, Parent, frame
from qdm_deploy.errors import QdmError
from qdm_deploy.samplers import NoiseSchedule
from qdm_deploy.serving.jobs import JobMaker
from qdm_deploy.serving.loading import Open, load, open_bundle_session
from qdm_deploy.serving.scheduler import Scheduler
from qdm_deploy.serving.settings import EXIT_BROKEN, EXIT_OUT_OF_MEMORY, Settings
from qdm_deploy.serving.stepper import Done, EngineBroken, Failed, Happened, Shown, Stepped, Stepper
from qdm_deploy.serving.wire import request_from

__all__ = ["main", "serve"]

_LOG = logging.getLogger("qdm_deploy.serving.child")  # not __name__: this module runs as __main__


class _Told(logging.Handler):
    """Keeps log records until they are sent: the parent writes all logs of the service in one form."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._frames: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record, with its traceback in the message."""
        self._frames.put(frame("log", level=record.levelno, name=record.name, message=self.format(record)))

    def take(self) -> bytes:
        """The frames since the last call."""
        return b"".join(self._frames.get() for _ in range(self._frames.qsize()))


_TOLD = _Told()


def serve(parent: Parent, open_: Open = open_bundle_session) -> None:
    """Serve one parent until it goes.

    Args:
        parent: its first frame holds the ``Settings``.
        open_: opens the session; tests put in their own.
    """
    settings = Settings(**parent.receive()[0]["settings"])
    try:
        bundle = Bundle.open(Path(settings.bundle))
        schedule = NoiseSchedule.from_config(bundle.scheduler_config())
        with ExitStack() as sessions:
            loaded = load(bundle, settings, open_, sessions)
            parent.send(_TOLD.take() + frame("ready", backend=loaded.backend, max_rows=loaded.max_rows))
            stepper = Stepper(Scheduler(loaded.max_rows, bundle.pipeline.interface), loaded.runner)
            _step_for_ever(parent, stepper, JobMaker(bundle.pipeline, schedule, loaded.max_rows))
    except QdmError as error:
        parent.send(_TOLD.take())
        parent.tell_error(error)


def _step_for_ever(parent: Parent, stepper: Stepper, maker: JobMaker) -> None:
    scheduler = stepper.scheduler
    happened: list[Happened] = []
    while True:
        idle = not scheduler.alive
        if idle and happened:
            # The parent learns of the end of the last request before we sleep.
            parent.send(_told(happened) + _running(scheduler))
            happened = []
        while idle or parent.has_spoken:
            happened += _obey(parent.receive(), scheduler, maker)
            idle = False
        happened += stepper.begin(time.monotonic())
        # One write for each step: what came of the last one, and who takes part in the next. It is sent before the step
        # runs, so that the parent knows whose step it was when this process dies in it.
        parent.send(_TOLD.take() + _told(happened) + _running(scheduler))
        happened = stepper.run()


def _obey(received: Frame, scheduler: Scheduler, maker: JobMaker) -> list[Happened]:
    header, _ = received
    if header["kind"] == "cancel":
        scheduler.end(header["request_id"])
        return []
    request, deadline = request_from(received)
    try:
        scheduler.submit(maker.job(request, deadline))
    except Exception as error:  # noqa: BLE001 - the parent checked it with the same code, so this is no known error
        _LOG.exception("the request %s cannot be taken in", request.request_id)
        return [Failed(request.request_id, "engine_error", f"the engine cannot take it in: {type(error).__name__}")]
    return []


def _running(scheduler: Scheduler) -> bytes:
    return frame("running", requests=scheduler.running_requests())


def _told(happened: list[Happened]) -> bytes:
    return b"".join(_frame_of(item) for item in happened)


def _frame_of(item: Happened) -> bytes:
    if isinstance(item, Stepped):
        return frame("stepped", rows=item.rows, padding=item.padding, seconds=item.seconds)
    if isinstance(item, Shown):
        return frame("shown", [item.x0], request_id=item.request_id, image=item.image, step=item.step, steps=item.steps)
    if isinstance(item, Done):
        return frame("done", [item.samples], request_id=item.request_id)
    return frame("failed", request_id=item.request_id, reason=item.reason, message=item.message)


def main(arguments: list[str], open_: Open = open_bundle_session) -> int:
    """The process; returns its exit status."""
    logging.basicConfig(handlers=[_TOLD], level=logging.INFO, format="%(message)s")
    # A service manager may send SIGTERM to every process of the service (systemd does by default). The parent drains
    # then, and this process has to finish the requests.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # not SIG_IGN, which programs started from here would inherit
    parent = Parent(arguments[-1])
    try:
        serve(parent, open_)
    except MemoryError:
        _LOG.exception("out of memory")
        status = EXIT_OUT_OF_MEMORY
    except EngineBroken:
        _LOG.exception("the session is broken")
        status = EXIT_BROKEN
    else:
        status = 0
    parent.send(_TOLD.take())
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
