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

__all__ = ["SETTLING", "TURN", "milliseconds", "runs_in_all", "timed_in_turn"]

K = TypeVar("K", bound=Hashable)

TURN = 5
SETTLING = 2
_FIRST = 2


def runs_in_all(runs: int) -> int:
    """How often ``timed_in_turn`` runs each session, those that do not count among them."""
    return _FIRST + runs + SETTLING * math.ceil(runs / TURN)


def timed_in_turn(
    sessions: Mapping[K, StepSession],
    inputs: Mapping[str, NDArray[Any]],
    *,
    runs: int,
    seconds: float = math.inf,
    advance: Callable[[int], None] = lambda steps: None,
) -> dict[K, list[float]]:
    """Milliseconds of one step, ``runs`` times for every session, at most ``TURN`` of them in a row.

    Args:
        sessions: what to time.
        inputs: of the step.
        runs: how often each is timed.
        seconds: what that may take. Where it would take longer, single steps are timed in turn, as many as fit and one
            at least: steps that long do not suffer from what ran before them.
        advance: told how many steps are done.
    """
    for session in sessions.values():
        session.run(inputs)  # prepares this batch size
    times = {key: [milliseconds(session, inputs)] for key, session in sessions.items()}
    advance(_FIRST * len(sessions))
    round_s = sum(value for (value,) in times.values()) / 1000
    if round_s * (runs_in_all(runs) - _FIRST) > seconds:
        for _ in range(min(runs, int(seconds / round_s)) - 1):
            for key, session in sessions.items():
                times[key].append(milliseconds(session, inputs))
        advance((runs_in_all(runs) - _FIRST) * len(sessions))
        return times
    times = {key: [] for key in sessions}
    for done in range(0, runs, TURN):
        for key, session in sessions.items():
            for run in range(-SETTLING, min(TURN, runs - done)):
                value = milliseconds(session, inputs)
                if run >= 0:
                    times[key].append(value)
                advance(1)
    return times


def milliseconds(session: StepSession, inputs: Mapping[str, NDArray[Any]]) -> float:
    """What one step takes."""
    start = time.perf_counter()
    session.run(inputs)
    return 1000 * (time.perf_counter() - start)
