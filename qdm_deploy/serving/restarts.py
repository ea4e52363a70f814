"""When to start the engine process again, and when to give up."""

from collections import deque

__all__ = ["RestartPolicy"]


class RestartPolicy:
    """Exponential back-off; gives up when failures are frequent.

    Args:
        first_wait: seconds before the restart after a single failure; doubles with each further one in the window.
        longest_wait: bound of the wait in seconds.
        max_failures: this many failures in the window end it.
        window: seconds for which a failure counts.
    """

    def __init__(
        self,
        first_wait: float = 0.5,
        longest_wait: float = 30.0,
        max_failures: int = 5,
        window: float = 300.0,
    ) -> None:
        self.first_wait = first_wait
        self.longest_wait = longest_wait
        self.max_failures = max_failures
        self.window = window
        self._failures: deque[float] = deque()

    def failed(self, now: float) -> float | None:
        """Count a failure at ``now``; seconds to wait before the restart, or None to give up."""
        while self._failures and now - self._failures[0] > self.window:
            self._failures.popleft()
        self._failures.append(now)
        if len(self._failures) >= self.max_failures:
            return None
        return float(min(self.first_wait * 2 ** (len(self._failures) - 1), self.longest_wait))
