"""One of several workers: ``python -m qdm_deploy.batch.child``, started by ``workers``."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

from qdm_deploy.batch.run import run_place
from qdm_deploy.batch.task import TASK
from qdm_deploy.child_process import Parent
from qdm_deploy.errors import QdmError
from qdm_deploy.progress import Advance

__all__ = ["main"]


class _Reporting:
    """Progress as frames for the parent."""

    def __init__(self, parent: Parent) -> None:
        self._parent = parent

    @contextmanager
    def task(self, description: str, total: int | None) -> Iterator[Advance]:
        """One task: that of the run."""
        self._parent.tell("total", images=total or 0)

        def advance(steps: int = 1) -> None:
            self._parent.tell("advance", images=steps)

        yield advance

    def say(self, message: str) -> None:
        """A line for people."""
        self._parent.tell("say", message=message)


def main() -> None:
    """The child: read the task, run it, report."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    parent = Parent(sys.argv[-1])
    header, _ = parent.receive()
    task = TASK.validate_json(header["task"])
    try:
        parent.tell("result", place=asdict(run_place(task.options, task.place, _Reporting(parent))))
    except QdmError as error:
        parent.tell_error(error)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
