"""The engine process: opens the bundle, then steps as long as there is work, and tells its parent what happened.

``python -m qdm_deploy.serving.child FD`` with one end of a socket pair. It ends when the other end closes, so it never
outlives its parent, and it ends rather than go on with a session that fails whatever it is given.
"""

import ctypes
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path

from qdm_deploy.artifacts.bundle import Bundle
from qdm_deploy.errors import QdmError
from qdm_deploy.samplers import NoiseSchedule
from qdm_deploy.serving.jobs import JobMaker
from qdm_deploy.serving.loading import Open, load, open_bundle_session
from qdm_deploy.serving.scheduler import Scheduler
from qdm_deploy.serving.settings import EXIT_BROKEN, EXIT_OUT_OF_MEMORY, Settings
from qdm_deploy.serving.stepper import Done, EngineBroken, Failed, Happened, Shown, Stepped, Stepper
from qdm_deploy.serving.wire import Frame, frame, receive_frame, request_from

__all__ = ["main", "serve"]

_LOG = logging.getLogger("qdm_deploy.serving.child")  # not __name__: this module runs as __main__
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


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


def serve(stream: socket.socket, open_: Open = open_bundle_session) -> None:
    """Serve one parent until it goes.

    Args:
        stream: connected to the parent; its first frame holds the ``Settings``.
        open_: opens the session; tests put in their own.
    """
    first = receive_frame(stream)
    if first is None:
        return
    inbox: queue.SimpleQueue[Frame] = queue.SimpleQueue()
    # From here on: a load or a step may take long, and the parent may go meanwhile.
    threading.Thread(target=_receive_all, args=(stream, inbox), daemon=True).start()
    settings = Settings(**first[0]["settings"])
    try:
        bundle = Bundle.open(Path(settings.bundle))
        schedule = NoiseSchedule.from_config(bundle.scheduler_config())
        with ExitStack() as sessions:
            loaded = load(bundle, settings, open_, sessions)
            stream.sendall(_TOLD.take() + frame("ready", backend=loaded.backend, max_rows=loaded.max_rows))
            stepper = Stepper(Scheduler(loaded.max_rows, bundle.pipeline.interface), loaded.runner)
            _step_for_ever(stream, inbox, stepper, JobMaker(bundle.pipeline, schedule, loaded.max_rows))
    except QdmError as error:
        stream.sendall(_TOLD.take() + frame("refused", error=type(error).__name__, message=str(error)))


def _step_for_ever(stream: socket.socket, inbox: "queue.SimpleQueue[Frame]", stepper: Stepper, maker: JobMaker) -> None:
    scheduler = stepper.scheduler
    happened: list[Happened] = []
    while True:
        idle = not scheduler.alive
        if idle and happened:
            # The parent learns of the end of the last request before we sleep.
            stream.sendall(_told(happened) + _running(scheduler))
            happened = []
        while idle or not inbox.empty():
            happened += _obey(inbox.get(), scheduler, maker)
            idle = False
        happened += stepper.begin(time.monotonic())
        # One write for each step: what came of the last one, and who takes part in the next. It is sent before the step
        # runs, so that the parent knows whose step it was when this process dies in it.
        stream.sendall(_TOLD.take() + _told(happened) + _running(scheduler))
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


def _receive_all(stream: socket.socket, inbox: "queue.SimpleQueue[Frame]") -> None:
    """Move what the parent says into the inbox; the end of the stream ends this process, even inside a step."""
    with suppress(OSError):
        while (received := receive_frame(stream)) is not None:
            inbox.put(received)
    os._exit(0)


def _leave_signals_to_the_parent() -> None:
    """Run on through signals that ask the whole service to stop, and end with the parent even while stopped.

    A service manager may send SIGTERM to every process of the service (systemd does by default). The parent drains
    then, and this process has to finish the requests. A process that is stopped (SIGSTOP) cannot see its stream end, so
    on Linux the kernel is asked to kill it.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # not SIG_IGN, which programs started from here would inherit
    if sys.platform == "linux":
        with suppress(AttributeError, OSError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _last_words(stream: socket.socket, status: int) -> int:
    with suppress(OSError):
        stream.sendall(_TOLD.take())
    return status


def main(arguments: list[str], open_: Open = open_bundle_session) -> int:
    """The process; returns its exit status."""
    logging.basicConfig(handlers=[_TOLD], level=logging.INFO, format="%(message)s")
    _leave_signals_to_the_parent()
    # Where memory runs out, the system should end this process, which is started again, and not its parent.
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500")
    with socket.socket(fileno=int(arguments[0])) as stream:
        try:
            serve(stream, open_)
        except MemoryError:
            _LOG.exception("out of memory")
            return _last_words(stream, EXIT_OUT_OF_MEMORY)
        except EngineBroken:
            _LOG.exception("the session is broken")
            return _last_words(stream, EXIT_BROKEN)
        except ConnectionError:
            return 0  # the parent is gone
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
