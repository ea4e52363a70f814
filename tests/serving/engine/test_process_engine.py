"""The engine in its process: real children, really killed."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qdm_deploy.errors import BundleError, EnvironmentProblem, InputError
from qdm_deploy.runtime import OnnxRuntimeSession
from qdm_deploy.serving import ProcessEngine, RestartPolicy
from qdm_deploy.serving.contract import AdmissionRefused, GenerationFailed, GenerationRequest
from tests.serving.engine.faulty_child import HANGS, NO_MEMORY, NOT_A_NUMBER, RAISES

FAULTY = (str(Path(__file__).with_name("faulty_child.py")),)


class Recorder:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int]] = []
        self.refusals: list[str] = []
        self.outcomes: list[tuple[str, int]] = []
        self.restarts = 0

    def stepped(self, rows: int, padding_rows: int, seconds: float) -> None:
        assert seconds > 0
        self.steps.append((rows, padding_rows))

    def refused(self, reason: str) -> None:
        self.refusals.append(reason)

    def ended(self, outcome: str, images: int, queue_seconds: float, seconds: float) -> None:
        assert 0 <= queue_seconds <= seconds
        self.outcomes.append((outcome, images))

    def restarted(self) -> None:
        self.restarts += 1


@asynccontextmanager
async def started(
    bundle: Path, *, faulty: bool = False, **options: Any
) -> AsyncIterator[tuple[ProcessEngine, Recorder]]:
    chosen = {
        "backend": "onnxruntime",
        "threads": 1,
        "max_rows": 4,
        "restarts": RestartPolicy(first_wait=0.05),
        **options,
    }
    engine = ProcessEngine(bundle, **chosen)
    if faulty:
        engine._program = FAULTY
    recorder = Recorder()
    engine.add_observer(recorder)
    try:
        await engine.start()
        yield engine, recorder
    finally:
        await engine.close()


def request(name: str, images: int = 1, label: int = 0, **fields: Any) -> GenerationRequest:
    return GenerationRequest(name, tuple(range(images)), class_labels=(label,) * images, **{"steps": 5, **fields})


async def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


async def outcome(generation: Any) -> str:
    """ "finished", or the reason of its failure."""
    try:
        async with asyncio.timeout(60):
            await generation.result()
    except GenerationFailed as failure:
        return failure.reason
    return "finished"


def run(body: Coroutine[Any, Any, None]) -> None:
    asyncio.run(body)


def test_a_life_in_order(linear: Path, alone: Any) -> None:
    async def body() -> None:
        async with started(linear) as (engine, recorder):
            assert engine.state.phase == "ready"
            assert engine.state.backend["backend"] == "onnxruntime"
            wanted = [
                request("a", 3, 1, steps=6, previews=2),
                request("b", 1, 2, sampler="ddpm", guidance=3.0),
                request("c", 2, 4, sampler="dpmpp-2m", steps=9),
            ]
            generations = [engine.submit(item) for item in wanted]
            results = await asyncio.gather(*(generation.result() for generation in generations))
            with OnnxRuntimeSession(linear / "unet/onnxruntime.onnx", threads=1) as session:
                for item, result in zip(wanted, results, strict=True):
                    # A linear network on one backend: equal but for the order of sums in another batch size.
                    np.testing.assert_allclose(result.samples, alone(linear, session, item), atol=1e-6)
                    assert 0 <= result.queue_seconds <= result.seconds
            previews = [(preview.image, preview.step) async for preview in generations[0].previews()]
            assert sorted(previews) == [(image, step) for image in range(3) for step in (2, 4)]
            assert engine.state.running == ()
            assert engine.state.waiting == 0
            await until(lambda: sum(rows for rows, _ in recorder.steps) == 3 * 6 + 2 * 5 + 2 * 9)
            assert sorted(recorder.outcomes) == [("finished", 1), ("finished", 2), ("finished", 3)]
        assert engine.state.phase == "dead"
        await engine.close()
        with pytest.raises(AdmissionRefused, match="given up or was closed"):
            engine.submit(request("late"))

    run(body())


def test_killed_child_fails_what_ran_and_the_next_one_runs_what_waited(linear: Path) -> None:
    async def body() -> None:
        async with started(linear, faulty=True, max_rows=1) as (engine, recorder):
            ran, waited = engine.submit(request("ran", steps=100)), engine.submit(request("waited"))
            await until(lambda: engine.state.running_rows == 1)
            assert engine.pid is not None
            os.kill(engine.pid, signal.SIGKILL)
            with pytest.raises(GenerationFailed, match=r"killed \(SIGKILL\).*ran out of memory.*can be repeated"):
                await ran.result()
            assert engine.state.phase == "restarting"
            with pytest.raises(AdmissionRefused, match="is being restarted") as refusal:
                engine.submit(request("early"))
            assert refusal.value.reason == "loading"
            assert await outcome(waited) == "finished"
            assert await outcome(engine.submit(request("new"))) == "finished"
            assert (engine.state.phase, engine.state.restarts, recorder.restarts) == ("ready", 1, 1)
            assert recorder.outcomes == [("engine_error", 0), ("finished", 1), ("finished", 1)]

    run(body())


@pytest.mark.parametrize("how", ["hangs", "stopped"])
def test_a_hung_step_is_ended(linear: Path, how: str) -> None:
    async def body() -> None:
        async with started(linear, faulty=True, step_timeout=0.5, max_rows=2) as (engine, _):
            if how == "hangs":
                generation = engine.submit(request("hangs", label=HANGS))
            else:
                generation = engine.submit(request("stopped", steps=100))
                await until(lambda: engine.state.running_rows == 1)
                assert engine.pid is not None
                os.kill(engine.pid, signal.SIGSTOP)
            with pytest.raises(GenerationFailed, match=r"a denoising step hung for more than 0\.5 s"):
                await generation.result()
            await until(lambda: engine.state.phase == "ready")
            assert await outcome(engine.submit(request("next"))) == "finished"

    run(body())


def test_faults_stay_with_their_request(linear: Path, alone: Any) -> None:
    async def body() -> None:
        async with started(linear, faulty=True, deterministic=True) as (engine, _):
            neighbour = request("neighbour", steps=30, sampler="ddpm")
            before = (await engine.submit(neighbour).result()).samples
            again = engine.submit(neighbour)
            assert await outcome(engine.submit(request("nan", label=NOT_A_NUMBER))) == "not_finite"
            assert await outcome(engine.submit(request("raises", label=RAISES))) == "engine_error"
            assert await outcome(engine.submit(request("huge", label=0, guidance=-3e38))) in ("finished", "not_finite")
            np.testing.assert_array_equal((await again.result()).samples, before)
            assert engine.state.restarts == 0

    run(body())


def test_out_of_memory_ends_the_child_and_not_the_engine(linear: Path) -> None:
    async def body() -> None:
        async with started(linear, faulty=True) as (engine, _):
            with pytest.raises(GenerationFailed, match="ran out of memory"):
                await engine.submit(request("large", label=NO_MEMORY)).result()
            await until(lambda: engine.state.phase == "ready")
            assert await outcome(engine.submit(request("next"))) == "finished"

    run(body())


def test_a_cancelled_request_frees_its_row(linear: Path) -> None:
    async def body() -> None:
        async with started(linear, faulty=True, max_rows=1) as (engine, _):
            long, waits, new = (engine.submit(request(name, steps=100)) for name in ("long", "waits", "new"))
            await until(lambda: engine.state.running_rows == 1)
            assert engine.state.waiting == 2
            waits.cancel()
            long.cancel()
            long.cancel()
            assert await outcome(long) == await outcome(waits) == "cancelled"
            await until(lambda: any(name == "new" for name, *_ in engine.state.running))
            assert [preview async for preview in long.previews()] == []
            new.cancel()
            await until(lambda: engine.state.running_rows == 0)
            assert await outcome(engine.submit(request("long"))) == "finished"  # its id is free again

    run(body())


def test_deadlines_hold_in_the_batch_and_in_the_queue(linear: Path) -> None:
    async def body() -> None:
        async with started(linear, faulty=True, max_rows=1) as (engine, _):
            start = time.monotonic()
            runs = engine.submit(request("runs", steps=100, deadline=0.4))
            waits = engine.submit(request("waits", deadline=0.2))
            assert await outcome(waits) == "deadline"
            assert await outcome(runs) == "deadline"
            assert 0.4 <= time.monotonic() - start < 0.9
            assert await outcome(engine.submit(request("next", deadline=30.0))) == "finished"

    run(body())


def test_the_queue_is_bounded_and_says_when_to_come_again(linear: Path) -> None:
    async def body() -> None:
        async with started(linear, faulty=True, max_rows=2, max_waiting=1) as (engine, recorder):
            # At once, before the child can say anything: two fit, one waits.
            admitted = [engine.submit(request(name, steps=40)) for name in ("a", "b", "c")]
            assert engine.state.waiting == 1
            with pytest.raises(AdmissionRefused, match="1 requests wait already") as refusal:
                engine.submit(request("d"))
            assert refusal.value.reason == "queue_full"
            assert 1 <= refusal.value.retry_after <= 60
            with pytest.raises(InputError, match="the request id 'a' is in use"):
                engine.submit(request("a"))
            await until(lambda: engine.state.running_rows == 2)
            assert engine.state.waiting == 1
            assert [await outcome(generation) for generation in admitted] == ["finished"] * 3
            assert recorder.refusals == ["queue_full"]
            assert await outcome(engine.submit(request("d"))) == "finished"

    run(body())


def test_drain_finishes_what_was_admitted(linear: Path) -> None:
    async def body() -> None:
        async with started(linear, faulty=True, max_rows=2) as (engine, _):
            admitted = [engine.submit(request(str(index), steps=20)) for index in range(6)]
            draining = asyncio.create_task(engine.drain(30))
            await asyncio.sleep(0)
            assert engine.state.phase == "draining"
            with pytest.raises(AdmissionRefused, match="shutting down"):
                engine.submit(request("late"))
            assert [await outcome(generation) for generation in admitted] == ["finished"] * 6
            await draining
            assert engine.state.phase == "dead"

    run(body())


def test_drain_fails_what_does_not_finish_in_time(linear: Path) -> None:
    async def body() -> None:
        async with started(linear, faulty=True, max_rows=1) as (engine, _):
            pid = engine.pid
            generations = [engine.submit(request("runs", steps=100)), engine.submit(request("waits"))]
            await engine.drain(0.2)
            assert [await outcome(generation) for generation in generations] == ["shutdown"] * 2
            assert pid is not None
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)

    run(body())


def test_it_gives_up_when_failures_are_frequent(linear: Path) -> None:
    async def body() -> None:
        policy = RestartPolicy(first_wait=0.01, max_failures=2)
        async with started(linear, faulty=True, restarts=policy) as (engine, _):
            assert await outcome(engine.submit(request("a", label=NO_MEMORY))) == "engine_error"
            await until(lambda: engine.state.phase == "ready")
            assert await outcome(engine.submit(request("b", label=NO_MEMORY))) == "engine_error"
            await until(lambda: engine.state.phase == "dead")
            with pytest.raises(AdmissionRefused) as refusal:
                engine.submit(request("c"))
            assert refusal.value.reason == "engine_dead"

    run(body())


def test_what_cannot_be_loaded_is_said_at_the_start(linear: Path, tmp_path: Path) -> None:
    async def body() -> None:
        with pytest.raises(BundleError, match="missing"):
            ProcessEngine(tmp_path / "missing")
        with pytest.raises(InputError, match="max_rows=0"):
            ProcessEngine(linear, max_rows=0)
        engine = ProcessEngine(linear, backend="magic")
        with pytest.raises(AdmissionRefused, match="is loading"):
            engine.submit(request("early"))
        with pytest.raises(InputError, match="the backend 'magic' is unknown"):
            await engine.start()
        assert engine.state.phase == "dead"
        with pytest.raises(InputError, match="9 lanes cannot share 1 threads and 4 rows"):
            async with started(linear, lanes=9):
                pass
        broken = ProcessEngine(linear)
        broken._program = ("-c", "import os; os.abort()")
        with pytest.raises(EnvironmentProblem, match="crashed with SIGABRT"):
            await broken.start()
        slow = ProcessEngine(linear, load_timeout=0.1)
        slow._program = ("-c", "import time; time.sleep(60)")
        with pytest.raises(EnvironmentProblem, match=r"did not load the bundle within 0\.1 s"):
            await slow.start()
        with pytest.raises(RuntimeError, match="make another"):
            await slow.start()

    run(body())


def test_a_changed_byte_is_found_before_anything_is_served(linear: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy.qdm"
    shutil.copytree(linear, copy)
    graph = copy / "unet/onnxruntime.onnx"
    content = bytearray(graph.read_bytes())
    content[len(content) // 2] ^= 1
    graph.write_bytes(content)

    async def body() -> None:
        with pytest.raises(BundleError, match=r"unet/onnxruntime\.onnx has SHA-256"):
            async with started(copy):
                pass

    run(body())


def test_the_child_ends_with_its_parent(linear: Path) -> None:
    import subprocess
    import sys

    program = (
        "import asyncio, os, sys\n"
        "from pathlib import Path\n"
        "from qdm_deploy.serving import ProcessEngine\n"
        "async def main():\n"
        "    engine = ProcessEngine(Path(sys.argv[1]), backend='onnxruntime', threads=1)\n"
        "    await engine.start()\n"
        "    print(engine.pid, flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(linear)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        os.kill(child, 0)
        parent.kill()
        parent.wait()
        for _ in range(500):
            if not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2]:
                return
            time.sleep(0.01)
    pytest.fail("the engine process outlived its parent by 5 seconds")


def test_back_off_doubles_forgets_and_ends() -> None:
    policy = RestartPolicy(first_wait=1.0, longest_wait=3.0, max_failures=5, window=100.0)
    assert [policy.failed(now) for now in (0.0, 1.0, 2.0, 3.0)] == [1.0, 2.0, 3.0, 3.0]
    assert policy.failed(101.5) == 3.0  # two of them are forgotten
    assert policy.failed(102.0) == 3.0
    assert RestartPolicy(max_failures=1).failed(0.0) is None
