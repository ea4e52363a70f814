"""Timing sessions in turn, several rounds: a machine that changes its speed changes it for all of them.

A turn is a few steps in a row, as a sampler takes them, and its first ones do not count: the caches still hold another
session's weights then, and the threads of another runtime may still be spinning on the cores. Timed step by step in
turn, a session that follows another runtime looked up to two times slower than it is in use.
"""

import math
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

from numpy.typing import NDArray

from qdm_deploy.runtime.session import StepSession

__all__ = ["runs_in_all", "timed_in_turn"]

K = TypeVar("K", bound=Hashable)

_TURN = 5
_SETTLING = 2


def runs_in_all(runs: int) -> int:
    """How often ``timed_in_turn`` runs each session, those that do not count among them."""
    return runs + _SETTLING * math.ceil(runs / _TURN)


def timed_in_turn(
    sessions: Mapping[K, StepSession],
    inputs: Mapping[str, NDArray[Any]],
    *,
    runs: int,
    advance: Callable[[], None] = lambda: None,
) -> dict[K, list[float]]:
    """Milliseconds of one step, ``runs`` times for every session, at most ``_TURN`` of them in a row."""
    times: dict[K, list[float]] = {key: [] for key in sessions}
    for done in range(0, runs, _TURN):
        for key, session in sessions.items():
            for run in range(-_SETTLING, min(_TURN, runs - done)):
                start = time.perf_counter()
                session.run(inputs)
                if run >= 0:
                    times[key].append(1000 * (time.perf_counter() - start))
                advance()
    return times
