"""The engine in its process: admission, outcomes, drain."""

import asyncio
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qdm_deploy.backends import OnnxRuntimeSession
from qdm_deploy.errors import BundleError, EnvironmentProblem, InputError
from qdm_deploy.serving import ProcessEngine
from qdm_deploy.serving.contract import AdmissionRefused
from tests.serving.engine.running import outcome, request, run, started, until


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


def test_requests_at_the_same_time_really_share_steps(linear: Path) -> None:
    async def body() -> None:
        async with started(linear, faulty=True, max_rows=8) as (engine, recorder):
            generations = [engine.submit(request(str(index), steps=10 + index)) for index in range(8)]
            assert [await outcome(generation) for generation in generations] == ["finished"] * 8
            await until(lambda: sum(rows for rows, _ in recorder.steps) == sum(range(10, 18)))
            # One by one they would take 108 steps; together as many as the longest, and a few until all had arrived.
            assert 17 <= len(recorder.steps) <= 24
            assert all(rows + padding in (1, 2, 3, 4, 6, 8) for rows, padding in recorder.steps)

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
            assert engine.state.waiting == 3
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
        broken = ProcessEngine(linear)
        broken._program = ("-c", "import os; os.abort()")
        with pytest.raises(EnvironmentProblem, match="crashed with SIGABRT"):
            await broken.start()
        full = ProcessEngine(linear)
        program = (
            "import sys\nfrom qdm_deploy.serving.child import main\n"
            "def load(*_): raise MemoryError\n"
            "sys.exit(main(sys.argv[1:], load))"
        )
        full._program = ("-c", program)
        with pytest.raises(EnvironmentProblem, match="the engine process ran out of memory"):
            await full.start()
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
