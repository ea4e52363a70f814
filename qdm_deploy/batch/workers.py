"""Several workers on one machine: a process each, because a session is one process's, with the cores divided.

The parent starts ``python -m qdm_deploy.batch.child``, hands it the options as a JSON line and reads one JSON object
per line back. A child leads a session of its own, so Ctrl-C reaches the parent alone, which passes it on; it ends by
itself when its parent is gone.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType
from typing import IO, Any, cast

from qdm_deploy import errors
from qdm_deploy.batch.job import threads_for
from qdm_deploy.batch.options import BatchOptions
from qdm_deploy.batch.place import Place
from qdm_deploy.batch.run import PlaceResult
from qdm_deploy.batch.stopping import STOP_SIGNALS
from qdm_deploy.batch.task import TASK, Task
from qdm_deploy.errors import QdmError, ResourceProblem, TryAgain
from qdm_deploy.progress import Advance, Progress

__all__ = ["run_workers"]

_END_SECONDS = 10.0


def run_workers(options: BatchOptions, place: Place, progress: Progress) -> list[PlaceResult]:
    """Make the shards of a place with ``options.workers`` processes.

    A worker that fails does not stop the others: what they commit stays.

    Raises:
        QdmError: the failure of the first worker that failed.
        ResourceProblem: a worker was killed.
        TryAgain: SIGTERM or SIGUSR1 came, and all workers stopped.
    """
    threads = threads_for(options, options.workers)
    tasks = [
        Task(replace(options, workers=1, threads=threads), place.split(number, options.workers))
        for number in range(options.workers)
    ]
    events: queue.Queue[tuple[int, dict[str, Any]]] = queue.Queue()
    with contextlib.ExitStack() as running:
        children = [running.enter_context(_started(task)) for task in tasks]
        running.enter_context(_passing_on(children))
        for number, child in enumerate(children):
            threading.Thread(target=_listen, args=(number, child, events), daemon=True).start()
        ends = _collect(events, len(children), progress)
    failed = [_failure(number, end) for number, end in enumerate(ends) if "result" not in end]
    # A worker that was told to stop says less than one that could not go on.
    for failure in sorted(failed, key=lambda error: isinstance(error, TryAgain)):
        raise failure
    return [PlaceResult(**end["result"]) for end in ends]


def _collect(
    events: "queue.Queue[tuple[int, dict[str, Any]]]", workers: int, progress: Progress
) -> list[dict[str, Any]]:
    """The last word of each worker; on the way, their progress on one bar."""
    ends: dict[int, dict[str, Any]] = {}
    totals: dict[int, int] = {}
    with contextlib.ExitStack() as open_task:
        advance: Advance | None = None
        waiting = 0
        while len(ends) < workers:
            number, event = events.get()
            if "say" in event:
                progress.say(event["say"])
            elif "total" in event:
                totals[number] = event["total"]
            elif "advance" in event:
                waiting += event["advance"]
            else:
                ends[number] = event
            if advance is None and totals and len(totals.keys() | ends.keys()) == workers:
                title = f"Generating images with {workers} workers"
                advance = open_task.enter_context(progress.task(title, sum(totals.values())))
            if advance is not None and waiting:
                advance(waiting)
                waiting = 0
    return [ends[number] for number in range(workers)]


def _failure(number: int, end: dict[str, Any]) -> QdmError:
    if "failed" in end:
        kind = getattr(errors, end["failed"])
        return cast(QdmError, kind(end["message"]))
    status = end["status"]
    if status == -signal.SIGKILL:
        return ResourceProblem(
            f"worker {number} was killed: usually the system ran out of memory. What was committed stays; run the same "
            "command again, with fewer --workers if memory is short"
        )
    if -status in STOP_SIGNALS:  # it had not begun to listen for them, or had just stopped
        name = signal.Signals(-status).name
        return TryAgain(f"worker {number} was stopped by {name}; run the same command again to go on")
    how = f"by {signal.Signals(-status).name}" if status < 0 else f"with exit status {status}"
    return QdmError(f"worker {number} ended {how}; what it printed is above. What was committed stays")


@contextmanager
def _started(task: Task) -> "Iterator[subprocess.Popen[str]]":
    folders = [os.path.abspath(folder) for folder in sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    command = [sys.executable, "-P", "-m", "qdm_deploy.batch.child"]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env=environment,
        start_new_session=True,
    ) as child:
        try:
            stream = cast(IO[str], child.stdin)
            with contextlib.suppress(BrokenPipeError):
                stream.write(TASK.dump_json(task).decode() + "\n")
                stream.flush()  # and left open: its end tells the child that we are gone
            yield child
        except BaseException:
            # Ctrl-C, most of all: let it clean up, but do not wait for ever.
            child.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(_END_SECONDS)
            raise
        finally:
            child.kill()
            with contextlib.suppress(BrokenPipeError):
                cast(IO[str], child.stdin).close()


@contextmanager
def _passing_on(children: "list[subprocess.Popen[str]]") -> Iterator[None]:
    """SIGTERM and SIGUSR1 go to the workers, which know how far their shards are."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        for child in children:
            child.send_signal(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, pass_on) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _listen(number: int, child: "subprocess.Popen[str]", events: "queue.Queue[tuple[int, dict[str, Any]]]") -> None:
    last: dict[str, Any] = {}
    for line in cast(IO[str], child.stdout):
        try:
            event = json.loads(line)
        except ValueError:
            break  # killed in the middle of a line; how it ended is told below
        if event.keys() & {"result", "failed"}:
            last = event
        else:
            events.put((number, event))
    status = child.wait()
    events.put((number, last or {"status": status}))
