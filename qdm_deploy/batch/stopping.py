"""SIGTERM and SIGUSR1 during a run: a scheduler wants the machine back.

The shard in work is finished where that takes no longer than the grace time, and dropped otherwise; SLURM sends SIGUSR1
ahead of the end with ``--signal=USR1@120``, Kubernetes SIGTERM 30 seconds before it kills. A second signal drops it.
"""

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

__all__ = ["STOP_SIGNALS", "Stopped", "Stopping"]

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Stopped(KeyboardInterrupt):
    """Raised where the work stood when it had to end at once; nothing on the way swallows a ``KeyboardInterrupt``."""


class Stopping:
    """Listens while the ``with`` block runs, in the main thread of a process; elsewhere it hears nothing.

    Args:
        grace: seconds that the work in hand may still take.
    """

    def __init__(self, grace: float) -> None:
        self._grace = grace
        self._before: dict[signal.Signals, Any] = {}
        self._ready_at: float | None = None
        self.asked: signal.Signals | None = None

    def expect(self, seconds: float | None) -> None:
        """The work in hand will be done in so many seconds; None: nobody knows."""
        self._ready_at = None if seconds is None else time.monotonic() + seconds

    def check(self) -> None:
        """End here if that was asked for: the work in hand is done.

        Raises:
            Stopped: it was.
        """
        if self.asked is not None:
            raise Stopped

    def _hear(self, number: int, frame: FrameType | None) -> None:
        again, self.asked = self.asked is not None, signal.Signals(number)
        soon = self._ready_at is not None and self._ready_at - time.monotonic() <= self._grace
        if again or not soon:
            raise Stopped

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
