"""How long work reports its progress, without knowing who watches.

Stages take a ``Progress`` and open one task per loop; the command line passes a rich progress bar, library users get
the silent default.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

__all__ = ["SILENT", "Advance", "Progress"]


class Advance(Protocol):
    """Moves one task forward by ``steps`` units of its total."""

    def __call__(self, steps: int = 1) -> None:
        """Move forward."""
        ...


class Progress(Protocol):
    """Where a stage announces its work."""

    def task(self, description: str, total: int | None) -> AbstractContextManager[Advance]:
        """Open a task of ``total`` units (None: unknown); the value advances it, the end of the context closes it."""
        ...

    def say(self, message: str) -> None:
        """One line for the person who waits."""
        ...


class _Silent:
    @contextmanager
    def task(self, description: str, total: int | None) -> Iterator[Advance]:
        def advance(steps: int = 1) -> None:
            return None

        yield advance

    def say(self, message: str) -> None:
        return None


SILENT: Progress = _Silent()
