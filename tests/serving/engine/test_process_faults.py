"""Real engine processes, really killed, hung and out of memory."""

import asyncio
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qdm_deploy.errors import EnvironmentProblem
from qdm_deploy.serving import ProcessEngine, RestartPolicy
from qdm_deploy.serving.contract import AdmissionRefused, GenerationFailed
from tests.serving.engine.faulty_child import HANGS, NO_MEMORY, NOT_A_NUMBER, RAISES
from tests.serving.engine.running import outcome, request, run, started, until


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


def test_the_next_child_runs_on_the_backend_that_the_first_one_chose(
    linear: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QDM_CACHE_DIR", str(tmp_path / "cache"))

    async def body() -> None:
        async with started(linear, backend="auto") as (engine, _):
            chosen = engine.state.backend["backend"]
            # Another child that chooses would find nothing, and take the time for a choice again.
            shutil.rmtree(tmp_path / "cache", ignore_errors=True)
            assert engine.pid is not None
            os.kill(engine.pid, signal.SIGKILL)
            await until(lambda: engine.state.restarts == 1 and engine.state.phase == "ready")
            assert engine.state.backend["backend"] == chosen
            assert not (tmp_path / "cache").exists()

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


def test_a_hung_step_is_ended_though_its_request_is_gone(linear: Path) -> None:
    async def body() -> None:
        async with started(linear, faulty=True, step_timeout=0.6, max_rows=1) as (engine, _):
            assert await outcome(engine.submit(request("hangs", label=HANGS, deadline=0.2))) == "deadline"
            # Others come and go by their deadlines; none of them gives the child more time.
            waited = 0
            while engine.state.phase == "ready":
                assert await outcome(engine.submit(request("waits", deadline=0.1))) == "deadline"
                waited += 1
                assert waited < 50
            await until(lambda: engine.state.phase == "ready")
            assert await outcome(engine.submit(request("next"))) == "finished"

    run(body())


def test_a_child_that_cannot_be_killed_holds_nothing_up(
    linear: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As one that hangs inside a driver: here it is stopped, and the signal never sent."""

    async def body() -> None:
        monkeypatch.setattr("qdm_deploy.serving.engine_process._LONGEST_DEATH", 0.2)
        monkeypatch.setattr(asyncio.subprocess.Process, "kill", lambda process: None)
        async with started(linear, faulty=True, step_timeout=0.5) as (engine, _):
            generation = engine.submit(request("stuck", steps=100))
            await until(lambda: engine.state.running_rows == 1)
            stuck = engine.pid
            assert stuck is not None
            os.kill(stuck, signal.SIGSTOP)
            try:
                with pytest.raises(GenerationFailed, match="a denoising step hung"):
                    await generation.result()
                await until(lambda: engine.state.phase == "ready")
                assert engine.pid != stuck
                assert await outcome(engine.submit(request("next"))) == "finished"
                assert f"the engine process {stuck} was killed and is still there" in caplog.text
            finally:
                # The next child is ended as usual, and this one is waited for: no process outlives the test.
                monkeypatch.undo()
                os.kill(stuck, signal.SIGKILL)
                await until(lambda: not Path(f"/proc/{stuck}").exists())

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


def test_out_of_memory_ends_the_child_and_not_the_engine(linear: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def body() -> None:
        async with started(linear, faulty=True) as (engine, _):
            with pytest.raises(GenerationFailed, match="ran out of memory"):
                await engine.submit(request("large", label=NO_MEMORY)).result()
            await until(lambda: engine.state.phase == "ready")
            assert await outcome(engine.submit(request("next"))) == "finished"
            # What the child logged comes out here, with its traceback.
            records = [
                record for record in caplog.records if record.getMessage().startswith("out of memory\nTraceback")
            ]
            assert [(record.levelname, record.name.rpartition(".")[2]) for record in records] == [("ERROR", "child")]

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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_child_leaves_stopping_to_its_parent(linear: Path, number: int) -> None:
    """As when a service manager sends the signal to every process of a service, and the parent drains."""

    async def body() -> None:
        async with started(linear, faulty=True) as (engine, _):
            generation = engine.submit(request("a", steps=30))
            await until(lambda: engine.state.running_rows == 1)
            assert engine.pid is not None
            os.kill(engine.pid, number)
            assert await outcome(generation) == "finished"
            assert engine.state.restarts == 0

    run(body())


def test_what_the_child_logs_while_it_loads_comes_out(linear: Path, caplog: pytest.LogCaptureFixture) -> None:
    program = (
        "import logging, sys\n"
        "from qdm_deploy.errors import EnvironmentProblem\n"
        "from qdm_deploy.serving.child import main\n"
        "def load(*_):\n"
        "    logging.getLogger('driver').warning('the clock is low')\n"
        "    raise EnvironmentProblem('no device')\n"
        "sys.exit(main(sys.argv[1:], load))"
    )

    async def body() -> None:
        engine = ProcessEngine(linear, backend="onnxruntime", threads=1)
        engine._program = ("-c", program)
        with pytest.raises(EnvironmentProblem, match="no device"):
            await engine.start()
        assert ("driver", "the clock is low") in [(record.name, record.getMessage()) for record in caplog.records]

    run(body())


@pytest.mark.parametrize("stopped", [False, True])
def test_the_child_ends_with_its_parent(linear: Path, stopped: bool) -> None:
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
        os.kill(child, signal.SIGSTOP if stopped else 0)
        while stopped and _state(child) != "T":
            time.sleep(0.01)
        parent.kill()
        parent.wait()
        for _ in range(500):
            if _state(child) in ("", "Z"):
                return
            time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the engine process outlived its parent by 5 seconds")


def _state(pid: int) -> str:
    """One letter, as ``ps`` shows it; empty where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


@pytest.mark.slow
def test_every_request_ends_once_while_children_are_killed(linear: Path) -> None:
    async def body() -> None:
        chance = np.random.default_rng(0)
        policy = RestartPolicy(first_wait=0.05, longest_wait=0.05, max_failures=100)
        async with started(linear, faulty=True, max_waiting=10, restarts=policy) as (engine, recorder):
            admitted: list[Any] = []
            refused = 0
            for index in range(1500):
                if index % 250 == 249 and engine.pid is not None:
                    os.kill(engine.pid, signal.SIGKILL)
                label = int(chance.choice([0, 2 + 3, NOT_A_NUMBER, RAISES], p=[0.8, 0.1, 0.05, 0.05]))
                wanted = request(
                    str(index), int(chance.integers(1, 4)), label, steps=int(chance.integers(1, 9)),
                    guidance=float(chance.choice([1.0, 3.0])), deadline=[None, 0.05][int(chance.random() < 0.1)],
                )  # fmt: skip
                try:
                    admitted.append(engine.submit(wanted))
                except AdmissionRefused:
                    refused += 1
                if admitted and chance.random() < 0.1:
                    admitted[int(chance.integers(len(admitted)))].cancel()
                await asyncio.sleep(float(chance.exponential(0.02)))
            outcomes = [await outcome(generation) for generation in admitted]
            assert len(recorder.outcomes) == len(admitted)
            assert sorted(name for name, _ in recorder.outcomes) == sorted(outcomes)
            assert set(outcomes) == {"finished", "cancelled", "deadline", "engine_error", "not_finite"}
            assert len(recorder.refusals) == refused
            assert 3 <= recorder.restarts <= 6
            assert (engine.state.running_rows, engine.state.waiting) == (0, 0)
            assert await outcome(engine.submit(request("last"))) == "finished"

    run(body())


def test_back_off_doubles_forgets_and_ends() -> None:
    policy = RestartPolicy(first_wait=1.0, longest_wait=3.0, max_failures=5, window=100.0)
    assert [policy.failed(now) for now in (0.0, 1.0, 2.0, 3.0)] == [1.0, 2.0, 3.0, 3.0]
    assert policy.failed(101.5) == 3.0  # two of them are forgotten
    assert policy.failed(102.0) == 3.0
    assert RestartPolicy(max_failures=1).failed(0.0) is None
