"""Progress for people: bars in a terminal, single lines in a log."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from os import environ
from typing import TextIO

from qdm_deploy.progress import Advance, Progress

__all__ = ["BarProgress", "LineProgress", "duration", "progress_on"]


def progress_on(stream: TextIO) -> Progress:
    """Bars where the stream is a terminal that can draw them, lines elsewhere."""
    if stream.isatty() and environ.get("TERM") not in ("dumb", "unknown"):
        return BarProgress(stream)
    return LineProgress(stream)


def duration(seconds: float) -> str:
    """Seconds as people say them: "0.4 s", "12 s", "3 min 20 s", "2 h 5 min"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


class BarProgress:
    """A bar per open task with its rate and the time left; a task that is done leaves one line."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            ProgressColumn,
            Task,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as Bars
        from rich.text import Text

        class Rate(ProgressColumn):
            """Steps a second."""

            def render(self, task: Task) -> Text:
                return Text(_rate(task.completed / task.elapsed) if task.elapsed and task.completed else "")

        self._bars = Bars(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            Rate(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(compact=True),
            console=Console(file=stream, highlight=False, markup=False, emoji=False, soft_wrap=True),
            transient=True,
        )

    @contextmanager
    def task(self, description: str, total: int | None) -> Iterator[Advance]:
        """Show a bar while the context is open."""
        start = time.perf_counter()
        # The display runs only while there is something to show, so that text printed in between stays readable.
        if not self._bars.tasks:
            self._bars.start()
        bar = self._bars.add_task(description, total=total)

        def advance(steps: int = 1) -> None:
            self._bars.advance(bar, steps)

        try:
            yield advance
            self.say(f"{description}: done in {duration(time.perf_counter() - start)}")
        finally:
            self._bars.remove_task(bar)
            if not self._bars.tasks:
                self._bars.stop()

    def say(self, message: str) -> None:
        """Print a line above the bars."""
        self._bars.console.print(message)


class LineProgress:
    """One line when a task begins, one when it is done, and one every ``interval_s`` seconds in between.

    The lines in between come from a thread: a log that stays silent for minutes looks like a program that hangs, even
    where the task has no steps to count.
    """

    def __init__(self, stream: TextIO, *, interval_s: float = 10.0) -> None:
        self._stream = stream
        self._interval_s = interval_s

    @contextmanager
    def task(self, description: str, total: int | None) -> Iterator[Advance]:
        """Report the task while the context is open."""
        start = time.perf_counter()
        done = 0
        closed = threading.Event()

        def advance(steps: int = 1) -> None:
            nonlocal done
            done += steps

        def report() -> None:
            while not closed.wait(self._interval_s):
                self.say(f"{description}: {_state(done, total, time.perf_counter() - start)}")

        self.say(f"{description} ...")
        reporter = threading.Thread(target=report, daemon=True)
        reporter.start()
        try:
            yield advance
        finally:
            closed.set()
            reporter.join()
        self.say(f"{description}: done in {duration(time.perf_counter() - start)}")

    def say(self, message: str) -> None:
        """Print a line."""
        # One write, so that lines of two threads do not mix.
        self._stream.write(f"{message}\n")
        self._stream.flush()


def _state(done: int, total: int | None, elapsed_s: float) -> str:
    if total is None or done == 0:
        return f"{duration(elapsed_s)} so far"
    left = elapsed_s * max(total - done, 0) / done
    rate = _rate(done / elapsed_s)
    return f"{done}/{total}, {rate}, {duration(elapsed_s)} so far, about {duration(left)} left"


def _rate(per_second: float) -> str:
    """Steps a second: "0.07/s", "12.5/s", "830/s"."""
    return f"{per_second:.0f}/s" if per_second >= 100 else f"{per_second:.3g}/s"
