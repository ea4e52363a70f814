"""Timing sessions in turn, round after round: a machine that changes its speed changes it for all of them."""

import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

from numpy.typing import NDArray

from qdm_deploy.runtime.session import StepSession

__all__ = ["WARM_UP", "timed_in_turn"]

K = TypeVar("K", bound=Hashable)

# The first run of a batch size compiles or allocates; the second still fills caches.
WARM_UP = 2


def timed_in_turn(
    sessions: Mapping[K, StepSession],
    inputs: Mapping[str, NDArray[Any]],
    *,
    runs: int,
    advance: Callable[[], None] = lambda: None,
) -> dict[K, list[float]]:
    """Milliseconds of one step, ``runs`` times for every session, after ``WARM_UP`` rounds that do not count."""
    times: dict[K, list[float]] = {key: [] for key in sessions}
    for run in range(runs + WARM_UP):
        for key, session in sessions.items():
            start = time.perf_counter()
            session.run(inputs)
            if run >= WARM_UP:
                times[key].append(1000 * (time.perf_counter() - start))
            advance()
    return times
