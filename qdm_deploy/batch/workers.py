"""Several workers on one machine: a process each, because a session is one process's, with the cores divided.

The parent starts ``qdm_deploy.batch.child`` (see ``qdm_deploy.child_process``), hands it its task and hears of its
progress. Ctrl-C reaches the parent alone, which passes it on.
"""

import contextlib
import queue
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType
from typing import Any

from qdm_deploy.batch.job import threads_for
from qdm_deploy.batch.options import BatchOptions
from qdm_deploy.batch.place import Place
from qdm_deploy.batch.run import PlaceResult
from qdm_deploy.batch.stopping import STOP_SIGNALS
from qdm_deploy.batch.task import TASK, Task
from qdm_deploy.child_process import Child, error_of, how_it_ended
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
        children = [running.enter_context(Child("qdm_deploy.batch.child")) for _ in tasks]
        running.enter_context(_passing_on(children))
        for number, (child, task) in enumerate(zip(children, tasks, strict=True)):
            child.tell("task", task=TASK.dump_json(task).decode())
            threading.Thread(target=_listen, args=(number, child, events), daemon=True).start()
        ends = _collect(events, len(children), progress)
    failed = [_failure(number, end) for number, end in enumerate(ends) if end["kind"] != "result"]
    # A worker that was told to stop says less than one that could not go on.
    for failure in sorted(failed, key=lambda error: isinstance(error, TryAgain)):
        raise failure
    return [PlaceResult(**end["place"]) for end in ends]


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
            match event["kind"]:
                case "say":
                    progress.say(event["message"])
                case "total":
                    totals[number] = event["images"]
                case "advance":
                    waiting += event["images"]
                case _:
                    ends[number] = event
            if advance is None and totals and len(totals.keys() | ends.keys()) == workers:
                title = f"Generating images with {workers} workers"
                advance = open_task.enter_context(progress.task(title, sum(totals.values())))
            if advance is not None and waiting:
                advance(waiting)
                waiting = 0
    return [ends[number] for number in range(workers)]


def _failure(number: int, end: dict[str, Any]) -> QdmError:
    if end["kind"] == "error":
        return error_of(end)
    status = end["status"]
    if -status in STOP_SIGNALS:  # it had not begun to listen for them, or had just stopped
        name = signal.Signals(-status).name
        return TryAgain(f"worker {number} was stopped by {name}; run the same command again to go on")
    how = f"worker {number} {how_it_ended(status)}"
    if status == -signal.SIGKILL:
        return ResourceProblem(
            f"{how}. What was committed stays; run the same command again, with fewer --workers if memory is short"
        )
    return QdmError(f"{how}; what it printed is above. What was committed stays")


@contextmanager
def _passing_on(children: Sequence[Child]) -> Iterator[None]:
    """What asks this process to stop goes to the workers, which know how far their shards are.

    SIGTERM and SIGUSR1 are passed on and the workers end by themselves; on Ctrl-C they get some seconds to clean up.
    """

    def pass_on(number: int, frame: FrameType | None) -> None:
        for child in children:
            child.send_signal(number)

    handled = STOP_SIGNALS if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, pass_on) for number in handled}
    try:
        yield
    except BaseException:
        pass_on(signal.SIGINT, None)
        with contextlib.suppress(subprocess.TimeoutExpired):
            for child in children:
                child.wait(_END_SECONDS)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _listen(number: int, child: Child, events: "queue.Queue[tuple[int, dict[str, Any]]]") -> None:
    last: dict[str, Any] | None = None
    for event in child.frames():
        if event["kind"] in ("result", "error"):
            last = event
        else:
            events.put((number, event))
    status = child.wait()
    events.put((number, last or {"kind": "ended", "status": status}))
