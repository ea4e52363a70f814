import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from qdm_deploy.serving.contract import GenerationRequest
from qdm_deploy.serving.generation import LiveGeneration
from qdm_deploy.serving.ledger import Ledger


def with_ledger(max_rows: int, max_waiting: int, body: Callable[[Ledger, Callable[..., None]], None]) -> None:
    async def run() -> None:
        ledger = Ledger(max_rows, max_waiting)

        def admit(name: str, images: int = 1, rows_each: int = 1) -> None:
            request = GenerationRequest(name, tuple(range(images)))
            ledger.alive[name] = LiveGeneration(request, rows_each, 0.0, lambda generation: None)

        body(ledger, admit)

    asyncio.run(run())


def test_a_request_that_the_next_step_will_hold_does_not_wait() -> None:
    def body(ledger: Ledger, admit: Any) -> None:
        admit("a", images=2)
        assert (ledger.waiting, ledger.full_for(2), ledger.full_for(1)) == (1, False, False)
        admit("guided", rows_each=2)
        assert ledger.waiting == 2
        assert ledger.full_for(1)  # four rows are spoken for, and nobody may wait
        ledger.take_running([("a", 0, 50, 2), ("guided", 0, 50, 2)], now=1.0)
        assert ledger.running_rows == 4
        assert ledger.alive["guided"].started == 1.0
        assert ledger.waiting == 0
        ledger.remove(ledger.alive["guided"])
        assert ledger.running_rows == 2
        assert not ledger.full_for(2)

    with_ledger(4, 0, body)


def test_nobody_overtakes_in_the_count() -> None:
    def body(ledger: Ledger, admit: Any) -> None:
        ledger.max_waiting = 2
        admit("runs", images=3)
        ledger.take_running([("runs", 4, 10, 3)], now=0.0)
        admit("guided", rows_each=2)  # one row is free, and it needs two
        assert ledger.waiting == 1
        assert not ledger.full_for(1)
        admit("plain")
        assert ledger.waiting == 2
        assert ledger.full_for(1)
        ledger.take_running([("ended long ago", 1, 2, 4)], now=1.0)
        assert ledger.running == {}

    with_ledger(4, 2, body)


def test_a_request_between_two_of_its_images_waits() -> None:
    def body(ledger: Ledger, admit: Any) -> None:
        admit("large", images=10)
        ledger.take_running([("large", 0, 9, 1)], now=0.0)
        admit("small")
        assert (ledger.waiting, ledger.full_for(1)) == (1, False)
        ledger.take_running([("small", 0, 9, 1)], now=1.0)
        assert (ledger.waiting, ledger.full_for(1)) == (1, False)
        admit("next")
        assert (ledger.waiting, ledger.full_for(1)) == (2, True)

    with_ledger(1, 2, body)


@pytest.mark.parametrize(("seconds", "expected"), [(0.1, 4.0), (1e6, 60.0)])
def test_retry_after_follows_the_pace_within_bounds(seconds: float, expected: float) -> None:
    def body(ledger: Ledger, admit: Any) -> None:
        admit("runs")
        ledger.take_running([("runs", 0, 10, 1)], now=0.0)
        assert ledger.retry_after() == 1.0
        for index in range(4):
            admit(str(index))
        ledger.served(seconds)
        assert ledger.retry_after() == expected

    with_ledger(1, 9, body)
