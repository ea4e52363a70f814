from typing import Any

import numpy as np
import pytest

from qdm_deploy.serving.contract import GenerationRequest
from qdm_deploy.serving.jobs import JobMaker, preview_steps
from qdm_deploy.serving.scheduler import Scheduler
from tests.serving.engine.fake import INTERFACE, MODEL, SCHEDULE, SHAPE, labels

MAKER = JobMaker(MODEL, SCHEDULE, 8)


def job(name: str, images: int = 1, *, guidance: float = 1.0, deadline: float | None = None, steps: int = 3) -> Any:
    request = GenerationRequest(
        name, tuple(range(images)), steps=steps, guidance=guidance, conditioning=labels((0,) * images)
    )
    return MAKER.job(request, deadline)


def started(scheduler: Scheduler) -> list[str]:
    return [f"{image.job.request_id}{image.index}" for image in scheduler.fill()]


def test_requests_take_turns_image_by_image() -> None:
    scheduler = Scheduler(4, INTERFACE)
    scheduler.submit(job("large", 6))
    assert started(scheduler) == ["large0", "large1", "large2", "large3"]
    scheduler.submit(job("small", 1))
    scheduler.submit(job("other", 2))
    for _ in range(3):
        for image in scheduler.running:
            image.step = 3
        scheduler.collect()
    # The large request was in front of the ring; one image of it starts, then one of each of the others.
    assert started(scheduler) == ["large4", "small0", "other0", "large5"]
    for image in scheduler.running:
        image.step = 3
    assert {name for name, _ in scheduler.collect()} == {"large", "small"}
    assert started(scheduler) == ["other1"]


def test_a_guided_image_waits_for_two_rows_and_is_not_passed_over() -> None:
    scheduler = Scheduler(3, INTERFACE)
    scheduler.submit(job("a", 2))
    assert started(scheduler) == ["a0", "a1"]
    scheduler.submit(job("guided", 1, guidance=2.0))
    scheduler.submit(job("b", 1))
    assert started(scheduler) == ["a0", "a1"]
    assert scheduler.running_rows == 2
    assert scheduler.end("a")
    assert started(scheduler) == ["guided0", "b0"]
    assert scheduler.running_rows == 3


def test_ending_a_request_gives_all_its_rows_back() -> None:
    scheduler = Scheduler(4, INTERFACE)
    scheduler.submit(job("guided", 2, guidance=3.0))
    assert started(scheduler) == ["guided0", "guided1"]
    scheduler.submit(job("next", 3))
    assert started(scheduler) == ["guided0", "guided1"]
    assert scheduler.running_rows == 4
    assert scheduler.end("guided")
    assert not scheduler.end("guided")
    assert started(scheduler) == ["next0", "next1", "next2"]
    assert scheduler.alive == {"next"}


def test_deadlines_end_waiting_and_running_requests() -> None:
    scheduler = Scheduler(1, INTERFACE)
    scheduler.submit(job("runs", deadline=5.0))
    scheduler.submit(job("waits", deadline=4.0))
    scheduler.submit(job("patient"))
    scheduler.fill()
    assert scheduler.expire(3.9) == []
    assert scheduler.expire(4.0) == ["waits"]
    assert scheduler.expire(6.0) == ["runs"]
    assert started(scheduler) == ["patient0"]


def test_samples_come_back_in_the_order_of_the_seeds() -> None:
    scheduler = Scheduler(8, INTERFACE)
    scheduler.submit(job("a", 3))
    images = scheduler.fill()
    for image, value in zip(images, (10.0, 20.0, 30.0), strict=True):
        image.state["sample"][...] = value
    images[2].step = images[0].step = 3
    assert scheduler.collect() == []
    assert scheduler.running_rows == 1
    images[1].step = 3
    ((name, samples),) = scheduler.collect()
    assert name == "a"
    assert samples[:, 0, 0, 0].tolist() == [10.0, 20.0, 30.0]
    assert scheduler.alive == frozenset()


def test_wrong_use_is_refused() -> None:
    scheduler = Scheduler(1, INTERFACE)
    scheduler.submit(job("a"))
    with pytest.raises(ValueError, match="a is alive already"):
        scheduler.submit(job("a"))
    with pytest.raises(ValueError, match="takes 2 rows of 1"):
        scheduler.submit(job("b", guidance=2.0))


@pytest.mark.parametrize(
    ("previews", "steps", "after"),
    [(0, 50, set()), (1, 50, {25}), (3, 50, {12, 25, 38}), (3, 2, {1}), (5, 1, set()), (99, 4, {1, 2, 3})],
)
def test_previews_are_spread_evenly_and_are_never_the_image(previews: int, steps: int, after: set[int]) -> None:
    assert preview_steps(previews, steps) == after


def test_initial_state_is_the_noise_of_the_seed() -> None:
    from qdm_deploy.samplers import initial_noise

    scheduler = Scheduler(2, INTERFACE)
    scheduler.submit(job("a", 2))
    np.testing.assert_array_equal([image.state["sample"] for image in scheduler.fill()], initial_noise([0, 1], SHAPE))
