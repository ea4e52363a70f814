"""How large the engine cache may grow, and which engines stay; a build writes files of a known size."""

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qdm_deploy.engines.cache import EngineCache, EngineIdentity
from qdm_deploy.engines.cache_limit import DEFAULT_LIMIT, bytes_of
from qdm_deploy.engines.request import BatchProfile, BuildOptions
from qdm_deploy.errors import InputError

PLAN = 10_000


def identity(target: str) -> EngineIdentity:
    return EngineIdentity(
        graph_sha256="0" * 64,
        data_sha256={},
        backend="tensorrt-rtx",
        library_version="1.7.1.116",
        target=target,
        profile=BatchProfile(),
        options=BuildOptions(),
    )


def write(folder: Path) -> float:
    (folder / "engine.plan").write_bytes(b"p" * PLAN)
    (folder / "log.txt").write_text("l")
    (folder / "audit.json").write_text("{}")
    return 1.0


@pytest.fixture
def filled(tmp_path: Path) -> Callable[..., EngineCache]:
    """A cache with an engine per target, each used a second after the one before."""

    def fill(*targets: str, max_bytes: int | None = None) -> EngineCache:
        cache = EngineCache(tmp_path / "cache", max_bytes=10**9)
        for second, target in enumerate(targets):
            folder, _, _ = cache.entry(identity(target), Path("g.onnx"), write)
            os.utime(folder / "meta.json", (1_000_000 + second, 1_000_000 + second))
        return EngineCache(cache.root, max_bytes=max_bytes)

    return fill


def targets(cache: EngineCache) -> set[str]:
    return {engine.meta.identity.target for engine in cache.list_engines() if engine.meta is not None}


@pytest.mark.parametrize(
    ("text", "value"),
    [("0", 0), ("812", 812), ("500M", 500 * 10**6), ("20 GB", 20 * 10**9), ("1.5GiB", 3 << 29), ("2k", 2000)],
)
def test_sizes_are_read_as_people_write_them(text: str, value: int) -> None:
    assert bytes_of(text) == value


@pytest.mark.parametrize("text", ["", "much", "-1G", "1 X", "1,5G"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=f"{text!r} is not a size; write a number with a unit, for example 500M"):
        bytes_of(text)


def test_the_limit_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("QDM_ENGINE_CACHE_LIMIT", raising=False)
    assert EngineCache(tmp_path).max_bytes == DEFAULT_LIMIT
    monkeypatch.setenv("QDM_ENGINE_CACHE_LIMIT", "3G")
    assert EngineCache(tmp_path).max_bytes == 3 * 10**9
    monkeypatch.setenv("QDM_ENGINE_CACHE_LIMIT", "a lot")
    with pytest.raises(InputError, match="QDM_ENGINE_CACHE_LIMIT cannot be read: 'a lot' is not a size"):
        EngineCache(tmp_path)


def test_a_build_removes_what_was_used_longest_ago(filled: Callable[..., EngineCache]) -> None:
    cache = filled("first", "second", "third", max_bytes=3 * PLAN + 6000)
    assert cache.entry(identity("first"), Path("g.onnx"), write)[2]  # found, and so the last one used
    cache.entry(identity("fourth"), Path("g.onnx"), write)
    assert targets(cache) == {"first", "third", "fourth"}


def test_an_engine_larger_than_the_limit_is_kept_alone(filled: Callable[..., EngineCache]) -> None:
    cache = filled("first", "second", max_bytes=10)
    folder, _, _ = cache.entry(identity("third"), Path("g.onnx"), write)
    assert targets(cache) == {"third"}
    assert folder.is_dir()


def test_prune_removes_damaged_engines_first_and_says_what_it_removed(filled: Callable[..., EngineCache]) -> None:
    cache = filled("first", "second", "third")
    (cache.root / identity("third").key / "log.txt").unlink()
    removed = cache.prune()
    assert [entry.problem for entry in removed] == ["log.txt is missing"]
    assert targets(cache) == {"first", "second"}
    assert [entry.meta.identity.target for entry in cache.prune(PLAN + 5000) if entry.meta] == ["first"]
    assert len(cache.prune(0)) == 1
    assert cache.list_engines() == ()
    assert [path.name for path in cache.root.iterdir() if path.name.startswith(".")] == []


def test_prune_leaves_an_engine_that_another_process_holds(filled: Callable[..., EngineCache]) -> None:
    cache = filled("first", "second")
    with (cache.root / "locks" / identity("first").key).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert len(cache.prune(0)) == 1
    assert targets(cache) == {"first"}


def test_prune_removes_what_killed_builds_left_and_no_build_that_runs(filled: Callable[..., EngineCache]) -> None:
    cache = filled("first")
    left, running = (cache.root / f".{identity(name).key[:50]}.tmp-00000000" for name in ("left", "running"))
    for folder in (left, running):
        folder.mkdir()
        (folder / "engine.plan").write_bytes(b"p" * PLAN)
    (cache.root / "locks" / identity("left").key).touch()
    with (cache.root / "locks" / identity("running").key).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert [engine.key for engine in cache.list_engines()] == [identity("first").key]
        assert cache.prune() == ()
    assert (left.exists(), running.exists()) == (False, True)
    assert targets(cache) == {"first"}


BUILDER = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_cache_limit import identity, write
from qdm_deploy.engines.cache import EngineCache

def build(folder):
    with open({builds!r}, "a") as stream:
        stream.write("built\\n")
    time.sleep(0.3)
    return write(folder)

folder, meta, found = EngineCache(Path({cache!r})).entry(identity("shared"), Path("g.onnx"), build)
assert (folder / "engine.plan").stat().st_size == 10_000
print(found)
"""


def test_many_processes_build_an_engine_once(tmp_path: Path) -> None:
    builds = tmp_path / "builds"
    program = BUILDER.format(tests=str(Path(__file__).parent), builds=str(builds), cache=str(tmp_path / "cache"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(6)]
    answers = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0] * 6
    assert builds.read_text() == "built\n"
    assert sorted(answers) == ["False", *["True"] * 5]
