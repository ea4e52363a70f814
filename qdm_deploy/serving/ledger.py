"""Who is alive, who runs and who waits, as the event loop's side knows it; and whether one more may come in."""

import math

from qdm_deploy.serving.generation import LiveGeneration

__all__ = ["Ledger"]

_LONGEST_RETRY = 60.0
_MEMORY = 0.2


class Ledger:
    """The requests that have not ended, in the order of their admission.

    Args:
        max_rows: rows of the largest batch.
        max_waiting: requests that may wait for a row.
    """

    def __init__(self, max_rows: int, max_waiting: int) -> None:
        self.max_rows = max_rows
        self.max_waiting = max_waiting
        self.alive: dict[str, LiveGeneration] = {}
        self.running: dict[str, tuple[int, int, int]] = {}
        """Step and steps of its furthest image, and rows, of each request that takes part in the current step."""
        self._service_seconds = 1.0

    @property
    def running_rows(self) -> int:
        """Rows that take part in the current step."""
        return sum(rows for _, _, rows in self.running.values())

    @property
    def waiting(self) -> int:
        """Requests without a row in the current step: with those that run, all that are alive."""
        return len(self.alive) - len(self.running)

    def full_for(self, rows_each: int) -> bool:
        """Whether a request whose images take this many rows would have to wait, and there is no place left to."""
        return self._without_room(rows_each) > self.max_waiting

    def retry_after(self) -> float:
        """Seconds until a place should be free: the requests before it, at the pace of the last ones."""
        ahead = self._without_room(None) / max(len(self.running), 1)
        return float(min(max(math.ceil(self._service_seconds * ahead), 1.0), _LONGEST_RETRY))

    def served(self, seconds: float) -> None:
        """A request finished, ``seconds`` after it had started."""
        self._service_seconds += _MEMORY * (seconds - self._service_seconds)

    def take_running(self, requests: list[tuple[str, int, int, int]], now: float) -> None:
        """What the child says of the step that begins: id, step, steps, rows of each request."""
        self.running = {}
        for request_id, step, steps, rows in requests:
            generation = self.alive.get(request_id)
            if generation is not None:
                self.running[request_id] = (step, steps, rows)
                if generation.started is None:
                    generation.started = now

    def remove(self, generation: LiveGeneration) -> None:
        """A request ended."""
        del self.alive[generation.request.request_id]
        self.running.pop(generation.request.request_id, None)

    def _without_room(self, rows_of_next: int | None) -> int:
        """Those that have no row and for which, in their order, too few rows are free.

        A request that was handed over a moment ago has no row yet, but it does not wait if the next step will hold it.
        One that had a row and wants more images waits like the others, or large requests would fill the queue unseen.
        """
        pending = [
            (generation.rows_each, len(generation.request.seeds))
            for generation in self.alive.values()
            if generation.request.request_id not in self.running
        ]
        if rows_of_next is not None:
            pending.append((rows_of_next, 1))
        free = self.max_rows - self.running_rows
        waiting = 0
        for rows_each, images in pending:
            if waiting == 0 and rows_each <= free:
                free -= min(images * rows_each, free - free % rows_each)
            else:
                waiting += 1
        return waiting
