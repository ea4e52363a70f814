"""One of several workers: ``python -m qdm_deploy.batch.child``, started by ``workers``."""

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import IO

from qdm_deploy.batch.run import run_place
from qdm_deploy.batch.task import TASK
from qdm_deploy.errors import QdmError
from qdm_deploy.progress import Advance

__all__ = ["main"]


class _Reporting:
    """Progress as events for the parent."""

    def __init__(self, events: IO[str]) -> None:
        self._events = events

    @contextmanager
    def task(self, description: str, total: int | None) -> Iterator[Advance]:
        """One task: that of the run."""
        self.tell(total=total or 0)

        def advance(steps: int = 1) -> None:
            self.tell(advance=steps)

        yield advance

    def say(self, message: str) -> None:
        """A line for people."""
        self.tell(say=message)

    def tell(self, **event: object) -> None:
        self._events.write(json.dumps(event) + "\n")
        self._events.flush()


def main() -> None:
    """The child: read the task, run it, report."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Native code prints where it likes; only our events may reach the pipe.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as stream:
        os.dup2(2, 1)
        events = _Reporting(stream)
        task = TASK.validate_json(sys.stdin.readline())
        threading.Thread(target=_end_with_parent, daemon=True).start()
        try:
            events.tell(result=asdict(run_place(task.options, task.place, events)))
        except QdmError as error:
            events.tell(failed=type(error).__name__, message=str(error))
        except KeyboardInterrupt:
            sys.exit(130)


def _end_with_parent() -> None:
    while os.read(0, 1):  # not sys.stdin: a thread waiting inside it would block the end of the interpreter
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
