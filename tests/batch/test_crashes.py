"""Killed, interrupted, out of disk space: what was committed stays, and the same command goes on."""

import json
import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from qdm_deploy.batch import batch_status, verify_batch
from qdm_deploy.batch.staging import leftovers, staged, sweep
from qdm_deploy.batch.workers import _listen
from qdm_deploy.child_process import Child
from qdm_deploy.errors import ResourceProblem

Make = Callable[..., Any]
Shards = Callable[[Path], dict[str, bytes]]
Line = Callable[..., list[str]]


@pytest.fixture
def line(classes: Path, repository: Path) -> Line:
    """The command line of a quick job."""

    def words(out: Path, **changes: Any) -> list[str]:
        options = {
            "num": 23, "shard-size": 6, "batch-size": 4, "steps": 2, "backend": "onnxruntime", "threads": 1, **changes,
        }  # fmt: skip
        named = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        return [sys.executable, "-m", "qdm_deploy.cli.main", "batch", str(classes), "--out", str(out), *named]

    return words


@contextmanager
def started(command: list[str], repository: Path) -> "Iterator[subprocess.Popen[str]]":
    with subprocess.Popen(command, cwd=repository, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        try:
            yield child
        finally:
            child.kill()


def wait_for(what: Callable[[], bool], child: "subprocess.Popen[str]") -> None:
    end = time.monotonic() + 60
    while not what():
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < end
        time.sleep(0.002)


def killed_at_random(out: Path, bundle: Path, repository: Path, *, count: int, kills: int) -> dict[str, Any]:
    options = {
        "bundle": str(bundle), "out": str(out), "count": count, "shard_size": 5, "batch_size": 5, "steps": 2,
        "backend": "onnxruntime", "threads": 1,
    }  # fmt: skip
    request = {"options": options, "kills": kills, "longest": 0.15, "seed": 1}
    environment = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(repository / "tests" / "batch" / "fork_server.py"), json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize(("kills", "count"), [(8, 100), pytest.param(200, 600, marks=pytest.mark.slow)])
def test_kills_at_random_times_and_racing_workers_change_no_byte(
    make: Make, shards: Shards, classes: Path, repository: Path, tmp_path: Path, kills: int, count: int
) -> None:
    make(tmp_path / "undisturbed", count=count, shard_size=5, batch_size=5)
    found = killed_at_random(tmp_path / "killed", classes, repository, count=count, kills=kills)
    assert (found["ends"], found["failed"]) == ([0, 0], 0)
    assert sum(found["where"].values()) >= kills
    if kills > 100:
        assert found["where"].get("inside a shard", 0) > 10, found
    assert verify_batch(tmp_path / "killed").findings == ()
    assert shards(tmp_path / "killed") == shards(tmp_path / "undisturbed")
    assert leftovers(tmp_path / "killed") == []
    assert len(list((tmp_path / "killed").glob("shard-*.json"))) == count // 5


@pytest.mark.parametrize(("form", "size"), [("webdataset", "600k"), ("npz", "40k"), ("png", "600k")])
def test_a_full_disk_loses_nothing(
    make: Make, shards: Shards, mount: Callable[[Path, str], Path], tmp_path: Path, form: str, size: str
) -> None:
    make(tmp_path / "whole", format=form, count=400, shard_size=50, batch_size=50)
    disk = mount(tmp_path / "disk", f"size={size}")
    options = {"format": form, "count": 400, "shard_size": 50, "batch_size": 50}
    with pytest.raises(ResourceProblem, match=r"cannot be written \(No space left on device.*MiB are free"):
        make(disk / "out", **options)
    status = batch_status(disk / "out")
    assert 0 < status.shards < 8
    assert leftovers(disk / "out") == []
    there = shards(disk / "out")
    assert verify_batch(disk / "out").bad == status.missing
    subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
    assert make(disk / "out", **options).there == status.shards
    assert shards(disk / "out") == shards(tmp_path / "whole")
    assert there.items() <= shards(disk / "out").items()


def test_a_full_disk_is_exit_code_5(
    line: Line, mount: Callable[[Path, str], Path], repository: Path, tmp_path: Path
) -> None:
    disk = mount(tmp_path / "disk", "size=64k")
    command = line(disk / "out", num=400, **{"shard-size": 100})
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (5, "")
    assert "No space left on device" in done.stderr
    assert leftovers(disk / "out") == []


def test_sigterm_drops_the_shard_that_needs_long_and_exits_75(
    line: Line, make: Make, shards: Shards, repository: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = line(out, num=600, **{"shard-size": 60, "grace": 0})
    with started(command, repository) as child:
        wait_for(lambda: len(list(out.glob("shard-*.json"))) >= 1 and bool(leftovers(out)), child)
        child.send_signal(signal.SIGTERM)
        printed, said = child.communicate(timeout=60)
    assert (child.returncode, printed) == (75, "")
    assert "stopped by SIGTERM; " in said
    assert "of 10 shards are complete: run the same command again to go on" in said
    assert leftovers(out) == []
    assert 1 <= batch_status(out).shards < 10
    make(tmp_path / "whole", count=600, shard_size=60)
    again = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert shards(out) == shards(tmp_path / "whole")


def test_sigusr1_lets_a_shard_finish_that_is_nearly_done(line: Line, repository: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with started(line(out, num=6000, **{"shard-size": 300, "grace": 600}), repository) as child:
        wait_for(lambda: len(list(out.glob("shard-*.json"))) >= 1 and bool(leftovers(out)), child)
        time.sleep(0.02)
        before = len(list(out.glob("shard-*.json")))
        child.send_signal(signal.SIGUSR1)
        _, said = child.communicate(timeout=60)
    assert child.returncode == 75
    assert "stopped by SIGUSR1" in said
    assert leftovers(out) == []
    assert before <= batch_status(out).shards <= before + 2
    assert verify_batch(out).bad == batch_status(out).missing


def test_ctrl_c_leaves_complete_shards_and_nothing_else(line: Line, repository: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with started(line(out, num=6000, **{"shard-size": 300}), repository) as child:
        wait_for(lambda: len(list(out.glob("shard-*.json"))) >= 1 and bool(leftovers(out)), child)
        child.send_signal(signal.SIGINT)
        printed, said = child.communicate(timeout=60)
    assert (child.returncode, printed) == (130, "")
    assert said.splitlines()[-1].startswith("error: stopped; ")
    assert "Traceback" not in said
    assert leftovers(out) == []
    assert verify_batch(out).bad == batch_status(out).missing


def test_sigterm_while_workers_start_is_exit_code_75(line: Line, repository: Path, tmp_path: Path) -> None:
    with started(line(tmp_path / "out", num=6000, workers=2, **{"shard-size": 300, "grace": 0}), repository) as child:
        children = Path(f"/proc/{child.pid}/task/{child.pid}/children")
        wait_for(lambda: len(children.read_text().split()) == 2, child)
        time.sleep(0.05)  # until the parent passes signals on; a worker needs much longer before it listens
        child.send_signal(signal.SIGTERM)
        _, said = child.communicate(timeout=60)
    assert child.returncode == 75, said
    assert "stopped by SIGTERM" in said


def test_a_worker_that_dies_without_a_last_word_is_missed() -> None:
    events: queue.Queue[Any] = queue.Queue()
    with Child("tests.runtime.talking_child") as child:
        child.tell("die in a word")
        _listen(3, child, events)
    assert events.get_nowait()[1]["said"] == "all of it"
    assert events.get_nowait() == (3, {"kind": "ended", "status": -signal.SIGKILL})


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_workers_end_with_their_parent(
    line: Line, repository: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    out = tmp_path / "out"
    command = line(out, num=100000, workers=2, **{"shard-size": 300, "grace": 0})
    with started(command, repository) as child:
        wait_for(lambda: len(list(out.glob("shard-*.json"))) >= 2 and len(leftovers(out)) == 2, child)
        children = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
        assert len(children) == 2
        child.send_signal(number)
        child.wait(timeout=60)
    assert child.returncode == code
    end = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in children):
        assert time.monotonic() < end
        time.sleep(0.05)
    sweep(out)
    assert leftovers(out) == []
    assert verify_batch(out).bad == batch_status(out).missing


@pytest.mark.slow
def test_a_worker_that_is_killed_stops_no_other(line: Line, repository: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with started(line(out, num=3000, workers=2, **{"shard-size": 100}), repository) as child:
        wait_for(lambda: len(list(out.glob("shard-*.json"))) >= 2, child)
        children = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGKILL)
        _, said = child.communicate(timeout=120)
    assert child.returncode == 5
    assert "worker 0 was killed" in said
    missing = batch_status(out).missing
    assert missing
    assert {number % 2 for number in missing} == {0}


def test_only_what_nobody_writes_is_swept_away(tmp_path: Path) -> None:
    with staged(tmp_path / "shard-00000.tar") as mine:
        host = mine.name.partition(".tmp-")[2].rsplit("-", 2)[0]
        dead = subprocess.Popen([sys.executable, "-c", ""])
        dead.wait()
        hours = {"theirs": 0.0, "theirs-old": 7.0, "theirs-from-the-future": -7.0}
        names = {
            "dead": f".shard-00001.tar.tmp-{host}-{dead.pid}-00000001",
            "running": f".shard-00001.tar.tmp-{host}-{os.getppid()}-00000002",
            "same number, earlier container": f".shard-00001.tar.tmp-{host}-{os.getpid()}-00000003",
            "theirs": f".shard-00001.tar.tmp-elsewhere-1-{os.getpid()}-00000004",
            "theirs-old": ".shard-00001.tar.tmp-elsewhere-1-2-00000005",
            "theirs-from-the-future": ".shard-00001.tar.tmp-elsewhere-1-2-00000006",
            "somebody's": ".notes.tmp",
        }
        for key, name in names.items():
            path = tmp_path / name
            path.write_text("x")
            moment = time.clock_gettime(time.CLOCK_REALTIME) - 3600 * hours.get(key, 0.0)
            os.utime(path, (moment, moment))
        (tmp_path / f".shard-00002.tmp-{host}-{dead.pid}-00000007").mkdir()
        removed = {path.name for path in sweep(tmp_path)}
        gone = {names["dead"], names["same number, earlier container"], names["theirs-old"]}
        assert removed == {*gone, f".shard-00002.tmp-{host}-{dead.pid}-00000007"}
        assert mine.exists()
        kept = {path.name for path in tmp_path.iterdir()}
        assert kept == {*(set(names.values()) - gone), mine.name, ".lock"}
