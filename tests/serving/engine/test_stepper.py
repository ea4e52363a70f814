"""Scheduler and session in one process: results, isolation, padding, lanes."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from qdm_deploy.components.sampling import table_for
from qdm_deploy.runtime import denoise
from qdm_deploy.samplers.sampling import Sampling
from qdm_deploy.serving.batch import BatchRunner, batch_sizes
from qdm_deploy.serving.contract import GenerationRequest
from qdm_deploy.serving.jobs import JobMaker
from qdm_deploy.serving.lanes import Lanes, lane_rows, split
from qdm_deploy.serving.scheduler import Scheduler
from qdm_deploy.serving.stepper import Done, EngineBroken, Failed, Shown, Stepped, Stepper
from tests.serving.engine.fake import INTERFACE, MODEL, NOT_A_NUMBER, RAISES, SCHEDULE, SHAPE, FakeSession, labels

MAKER = JobMaker(MODEL, SCHEDULE, 8)
MIXED = [
    GenerationRequest("ddim", (1, 2), sampler="ddim", steps=5, conditioning=labels((0, 1)), previews=2),
    GenerationRequest("guided", (2,), sampler="ddpm", steps=3, conditioning=labels((1,)), guidance=4.0),
    GenerationRequest("eta", (3,), sampler="ddim", eta=0.8, steps=7, conditioning=labels((0,))),
    GenerationRequest("multistep", (4, 4, 5), sampler="dpmpp-2m", steps=4, conditioning=labels((0, 0, 1))),
    GenerationRequest("euler", (6,), sampler="euler", steps=6, conditioning=labels((1,)), guidance=0.0),
]


def stepper(session: Any = None, max_rows: int = 4, sizes: Sequence[int] | None = None) -> Stepper:
    return Stepper(Scheduler(max_rows, INTERFACE), BatchRunner(session or FakeSession(), max_rows, sizes))


def run(engine: Stepper, requests: Sequence[GenerationRequest], every: int = 1) -> Iterator[Any]:
    """Submit a request every few steps and step until all ended; what happened."""
    waiting = list(requests)
    step = 0
    while waiting or engine.scheduler.alive:
        if waiting and step % every == 0:
            engine.scheduler.submit(MAKER.job(waiting.pop(0)))
        yield from engine.begin(float(step))
        yield from engine.run()
        step += 1


def solo(request: GenerationRequest) -> Any:
    """The same images from ``denoise`` on a fake session."""
    table = table_for(MODEL.denoiser, SCHEDULE, request.sampler, request.steps, request.eta)
    return denoise(FakeSession(), Sampling(table, request.seeds, request.conditioning, request.guidance))


@pytest.mark.parametrize("every", [1, 2, 5])
@pytest.mark.parametrize("sizes", [None, (4,), (1, 2, 4)])
def test_requests_that_share_batches_get_the_images_they_get_alone(every: int, sizes: Any) -> None:
    happened = list(run(stepper(sizes=sizes), MIXED, every))
    done = {item.request_id: item.samples for item in happened if isinstance(item, Done)}
    assert done.keys() == {request.request_id for request in MIXED}
    for request in MIXED:
        np.testing.assert_array_equal(done[request.request_id], solo(request))
    steps = [item for item in happened if isinstance(item, Stepped)]
    expected = sum(len(request.seeds) * request.steps * (1 if request.guidance == 1 else 2) for request in MIXED)
    assert sum(item.rows for item in steps) == expected
    assert all(item.rows + item.padding in (sizes or (1, 2, 3, 4)) for item in steps)


def test_previews_are_the_predicted_images_of_their_steps() -> None:
    happened = list(run(stepper(), MIXED[:1]))
    shown = [(item.image, item.step, item.steps) for item in happened if isinstance(item, Shown)]
    assert sorted(shown) == [(0, 2, 5), (0, 3, 5), (1, 2, 5), (1, 3, 5)]
    first = next(item for item in happened if isinstance(item, Shown))
    assert first.x0.shape == SHAPE
    assert np.isfinite(first.x0).all()


def test_nan_fails_its_request_alone() -> None:
    poison = GenerationRequest("poison", (9, 9), steps=6, conditioning=labels((0, NOT_A_NUMBER)))
    happened = list(run(stepper(max_rows=6), [MIXED[0], poison, MIXED[2]]))
    (failed,) = [item for item in happened if isinstance(item, Failed)]
    assert (failed.request_id, failed.reason) == ("poison", "not_finite")
    assert "image 1 became NaN or infinite in step 1" in failed.message
    for item in happened:
        if isinstance(item, Done):
            np.testing.assert_array_equal(item.samples, solo(next(r for r in MIXED if r.request_id == item.request_id)))
    assert sum(isinstance(item, Done) for item in happened) == 2


@pytest.mark.parametrize("sizes", [None, (4,)])
def test_a_request_that_the_session_refuses_fails_alone(sizes: Any) -> None:
    poison = GenerationRequest("poison", (9,), steps=6, conditioning=labels((RAISES,)))
    happened = list(run(stepper(sizes=sizes), [MIXED[0], poison, MIXED[2]]))
    (failed,) = [item for item in happened if isinstance(item, Failed)]
    assert (failed.request_id, failed.reason, failed.message) == (
        "poison", "engine_error", "a denoising step failed: RuntimeError",
    )  # fmt: skip
    done = {item.request_id: item.samples for item in happened if isinstance(item, Done)}
    np.testing.assert_array_equal(done["ddim"], solo(MIXED[0]))
    np.testing.assert_array_equal(done["eta"], solo(MIXED[2]))


def test_a_session_that_fails_whatever_it_is_given_is_given_up() -> None:
    engine = stepper()
    poison = [GenerationRequest(str(index), (9,), steps=6, conditioning=labels((RAISES,))) for index in range(3)]
    happened = []
    with pytest.raises(EngineBroken, match="3 steps after each other failed"):
        happened.extend(run(engine, poison))


def test_a_session_that_only_runs_single_requests_is_given_up_but_one_bad_batch_is_not() -> None:
    class Small(FakeSession):
        failures = 1

        def run(self, inputs: Any) -> Any:
            if len(inputs["timestep"]) > 1 and self.failures:
                self.failures -= 1
                raise RuntimeError("std::bad_alloc")
            return super().run(inputs)

    singles = [GenerationRequest(str(index), (index,), steps=6, conditioning=labels((0,))) for index in range(2)]
    done = [item for item in run(stepper(Small()), singles) if isinstance(item, Done)]
    assert len(done) == 2
    session = Small()
    session.failures = 99
    with pytest.raises(EngineBroken, match="3 batches after each other failed, and no request of them alone"):
        list(run(stepper(session), singles))


def test_out_of_memory_is_nobodys_fault_and_ends_the_process() -> None:
    class Full(FakeSession):
        def run(self, inputs: Any) -> Any:
            raise MemoryError

    with pytest.raises(MemoryError):
        list(run(stepper(Full()), MIXED[:1]))


def test_cancelled_and_late_requests_free_their_rows_for_the_next_step() -> None:
    session = FakeSession()
    engine = stepper(session, max_rows=2)
    for name, deadline in (("cancelled", None), ("late", 3.0), ("next", None), ("last", None)):
        request = GenerationRequest(name, (1,), steps=50, conditioning=labels((0,)))
        engine.scheduler.submit(MAKER.job(request, deadline))
    for now in (0.0, 1.0):
        engine.begin(now)
        engine.run()
    assert {image.job.request_id for image in engine.scheduler.running} == {"cancelled", "late"}
    engine.scheduler.end("cancelled")
    engine.begin(2.0)
    engine.run()
    assert {image.job.request_id for image in engine.scheduler.running} == {"late", "next"}
    (late,) = engine.begin(3.0)
    assert (late.request_id, late.reason) == ("late", "deadline")  # type: ignore[union-attr]
    engine.run()
    assert [(image.job.request_id, image.step) for image in engine.scheduler.running] == [("next", 2), ("last", 1)]


def test_padding_is_zeros_that_point_to_themselves() -> None:
    session = FakeSession()
    engine = stepper(session, max_rows=8, sizes=(8,))
    # First a full batch, so that the rows below hold somebody's values.
    list(run(engine, [GenerationRequest("full", tuple(range(8)), "ddpm", 2, conditioning=labels((1,) * 8))]))
    list(run(engine, [GenerationRequest("guided", (1,), "ddpm", 2, conditioning=labels((1,)), guidance=2.0)]))
    for name, values in session.seen.items():
        if name in ("owner_row", "unconditional_row"):
            assert values[2:].tolist() == [2, 3, 4, 5, 6, 7]
        elif name == "guidance":
            assert values.tolist() == [2, 2, 1, 1, 1, 1, 1, 1]
        else:
            assert not values[2:].any(), name
    assert session.seen["owner_row"][:2].tolist() == [0, 0]
    assert session.seen["unconditional_row"][:2].tolist() == [1, 1]


def test_no_noise_of_an_earlier_image_reaches_a_later_one() -> None:
    session = FakeSession()
    engine = stepper(session, max_rows=1)
    list(run(engine, [GenerationRequest("noisy", (1,), "ddpm", 3, conditioning=labels((1,)))]))
    list(run(engine, [GenerationRequest("quiet", (1,), "ddim", 3, conditioning=labels((1,)))]))
    assert not session.seen["noise"].any()


def lanes(count: int, max_rows: int, sizes: Any = None, *, alone: bool = True) -> tuple[Stepper, list[FakeSession]]:
    sessions = [FakeSession() for _ in range(count + 1)]
    rows = lane_rows(max_rows, count)
    runners = [BatchRunner(session, rows, sizes) for session in sessions[:-1]]
    single = BatchRunner(sessions[-1], 2, None) if alone else None
    return Stepper(Scheduler(max_rows, INTERFACE), Lanes(runners, single)), sessions


@pytest.mark.parametrize(("count", "max_rows"), [(2, 8), (2, 5), (3, 6), (4, 4)])
def test_lanes_give_the_same_images(count: int, max_rows: int) -> None:
    engine, sessions = lanes(count, max_rows)
    happened = list(run(engine, MIXED, 2))
    done = {item.request_id: item.samples for item in happened if isinstance(item, Done)}
    for request in MIXED:
        np.testing.assert_array_equal(done[request.request_id], solo(request))
    assert all(session.rows for session in sessions)  # the last one ran what was alone
    assert max(sessions[-1].rows) <= 2


def test_an_error_in_one_lane_leaves_the_others_where_they_are() -> None:
    engine, _ = lanes(2, 4)
    poison = GenerationRequest("poison", (9,), steps=6, conditioning=labels((RAISES,)))
    happened = list(run(engine, [MIXED[0], poison, MIXED[2]]))
    assert [item.request_id for item in happened if isinstance(item, Failed)] == ["poison"]
    done = {item.request_id: item.samples for item in happened if isinstance(item, Done)}
    np.testing.assert_array_equal(done["ddim"], solo(MIXED[0]))
    np.testing.assert_array_equal(done["eta"], solo(MIXED[2]))


@pytest.mark.parametrize("lanes_", [1, 2, 3, 4, 5])
def test_no_mix_of_images_overflows_a_lane(lanes_: int) -> None:
    for max_rows in range(max(2, lanes_), 17):
        for guided in range(max_rows // 2 + 1):
            for plain in range(max_rows - 2 * guided + 1):
                names = [("g", 2.0)] * guided + [("p", 1.0)] * plain
                scheduler = Scheduler(max_rows, INTERFACE)
                for index, (name, guidance) in enumerate(names):
                    request = GenerationRequest(
                        f"{name}{index}", (0,), steps=1, guidance=guidance, conditioning=labels((0,))
                    )
                    scheduler.submit(MAKER.job(request))
                parts = split(scheduler.fill(), lanes_)
                assert sum(map(len, parts)) == len(names)
                largest = max(sum(image.job.rows_each for image in part) for part in parts)
                assert largest <= lane_rows(max_rows, lanes_), (max_rows, guided, plain)


def test_batch_sizes() -> None:
    assert batch_sizes(8, fixed_shapes=True, deterministic=False) == (1, 2, 3, 4, 6, 8)
    assert batch_sizes(5, fixed_shapes=True, deterministic=False) == (1, 2, 3, 4, 5)
    assert batch_sizes(8, fixed_shapes=False, deterministic=False) is None
    assert batch_sizes(8, fixed_shapes=False, deterministic=True) == (8,)
