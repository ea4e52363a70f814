"""Random schedules of arrivals, cancellations, faults and deadlines: one outcome each, no row and no place lost."""

import asyncio
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from qdm_deploy.components.sampling import table_for
from qdm_deploy.runtime import denoise
from qdm_deploy.samplers.sampling import Sampling
from qdm_deploy.serving.batch import BatchRunner
from qdm_deploy.serving.contract import GenerationRequest
from qdm_deploy.serving.generation import LiveGeneration
from qdm_deploy.serving.jobs import JobMaker
from qdm_deploy.serving.lanes import Lanes, lane_rows
from qdm_deploy.serving.ledger import Ledger
from qdm_deploy.serving.scheduler import Scheduler
from qdm_deploy.serving.stepper import Done, EngineBroken, Failed, Stepper
from tests.serving.engine.fake import INTERFACE, MODEL, NOT_A_NUMBER, RAISES, SCHEDULE, FakeSession, labels

MAX_ROWS, MAX_WAITING = 5, 12
MAKER = JobMaker(MODEL, SCHEDULE, MAX_ROWS)

kinds = st.tuples(
    st.integers(1, 4),  # images
    st.sampled_from(["ddim", "ddpm", "dpmpp-2m"]),
    st.integers(1, 4),  # steps
    st.sampled_from([1.0, 1.0, 2.5]),
    st.sampled_from([0, 1, 0, 1, 0, 1, RAISES, NOT_A_NUMBER]),
    st.sampled_from([None, None, None, 0.0, 2.0, 6.0]),  # deadline from now
)


@cache
def alone(images: int, sampler: str, steps: int, guidance: float, label: int) -> Any:
    table = table_for(MODEL.denoiser, SCHEDULE, sampler, steps)
    return denoise(FakeSession(), Sampling(table, range(images), labels((label,) * images), guidance))


class Schedules(RuleBasedStateMachine):
    submitted = 0  # over all examples

    def __init__(self) -> None:
        super().__init__()
        runners = [BatchRunner(FakeSession(), lane_rows(MAX_ROWS, 2), None) for _ in range(2)]
        self.engine = Stepper(Scheduler(MAX_ROWS, INTERFACE), Lanes(runners, None))
        self.ledger = Ledger(MAX_ROWS, MAX_WAITING)  # admits as the parent process does
        self.loop = asyncio.new_event_loop()
        self.now = 0.0
        self.wanted: dict[str, tuple[Any, ...]] = {}
        self.outcomes: dict[str, list[str]] = {}

    @property
    def scheduler(self) -> Scheduler:
        return self.engine.scheduler

    @rule(arrivals=st.lists(kinds, min_size=1, max_size=12))
    def arrive(self, arrivals: list[Any]) -> None:
        for images, sampler, steps, guidance, label, deadline in arrivals:
            name = f"r{len(self.wanted)}"
            request = GenerationRequest(
                name, tuple(range(images)), sampler, steps, guidance=guidance, conditioning=labels((label,) * images)
            )
            job = MAKER.job(request, None if deadline is None else self.now + deadline)
            self.wanted[name] = (images, sampler, steps, guidance, label)
            self.outcomes[name] = []
            Schedules.submitted += 1
            if self.ledger.full_for(job.rows_each):
                assert self.ledger.waiting >= MAX_WAITING
                self.outcomes[name].append("refused")
            else:
                self.loop.run_until_complete(self.admit(request, job.rows_each))
                self.scheduler.submit(job)

    async def admit(self, request: GenerationRequest, rows_each: int) -> None:
        self.ledger.alive[request.request_id] = LiveGeneration(request, rows_each, self.now, lambda generation: None)

    def end(self, name: str, outcome: str) -> None:
        self.outcomes[name].append(outcome)
        self.ledger.remove(self.ledger.alive[name])

    @rule(steps=st.integers(1, 6))
    def go_on(self, steps: int) -> None:
        for _ in range(steps):
            self.now += 1.0
            self.note(self.engine.begin(self.now))
            self.ledger.take_running(self.scheduler.running_requests(), self.now)
            try:
                self.note(self.engine.run())
            except EngineBroken:
                # The process would end here, and its parent fails what ran.
                for name in {image.job.request_id for image in self.scheduler.running}:
                    self.scheduler.end(name)
                    self.end(name, "engine_error")

    @rule(choice=st.integers(0, 1000))
    def cancel(self, choice: int) -> None:
        names = sorted(self.wanted)
        if not names:
            return
        name = names[choice % len(names)]
        before = self.scheduler.running_rows
        held = sum(image.job.rows_each for image in self.scheduler.running if image.job.request_id == name)
        if self.scheduler.end(name):
            self.end(name, "cancelled")
        assert self.scheduler.running_rows == before - held

    def note(self, happened: list[Any]) -> None:
        for item in happened:
            if isinstance(item, Done):
                self.end(item.request_id, "finished")
                np.testing.assert_array_equal(item.samples, alone(*self.wanted[item.request_id]))
            elif isinstance(item, Failed):
                self.end(item.request_id, item.reason)
                label = self.wanted[item.request_id][-1]
                if item.reason == "not_finite":
                    assert label == NOT_A_NUMBER
                elif item.reason == "engine_error":
                    assert label == RAISES

    @invariant()
    def nothing_is_lost_or_counted_twice(self) -> None:
        open_requests = {name for name, outcomes in self.outcomes.items() if not outcomes}
        assert self.scheduler.alive == open_requests == self.ledger.alive.keys()
        assert all(len(outcomes) <= 1 for outcomes in self.outcomes.values())
        assert self.scheduler.running_rows <= MAX_ROWS
        assert self.ledger.running_rows <= MAX_ROWS
        # Each has a row in the next step or a place in the queue.
        assert len(self.ledger.alive) <= MAX_ROWS + MAX_WAITING
        assert {image.job.request_id for image in self.scheduler.running} <= open_requests

    def teardown(self) -> None:
        self.loop.close()
        for _ in range(1000):
            if not self.scheduler.alive:
                break
            self.go_on(1)
        assert self.scheduler.alive == frozenset()
        assert self.scheduler.running == ()
        assert self.ledger.running_rows == 0
        assert self.scheduler.waiting == 0
        assert all(len(outcomes) == 1 for outcomes in self.outcomes.values())


def run_schedules(examples: int, steps: int) -> int:
    Schedules.submitted = 0
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        Schedules,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    return Schedules.submitted


def test_random_schedules() -> None:
    assert run_schedules(12, 20) > 200


@pytest.mark.slow
def test_ten_thousand_requests() -> None:
    assert run_schedules(300, 50) > 10_000
