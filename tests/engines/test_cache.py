"""The engine cache without an engine: a build is a function that writes three files."""

import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from qdm_deploy.engines.cache import EngineCache, EngineIdentity
from qdm_deploy.engines.request import BatchProfile, BuildOptions
from qdm_deploy.errors import EngineError, EnvironmentProblem

IDENTITY = EngineIdentity(
    graph_sha256="0" * 64,
    data_sha256={"weights.bin": "1" * 64},
    backend="tensorrt-rtx",
    library_version="1.7.1.116",
    target="SM 8.9",
    profile=BatchProfile(),
    options=BuildOptions(),
)


def write(folder: Path) -> float:
    for name in ("engine.plan", "log.txt", "audit.json"):
        (folder / name).write_text(name)
    return 1.5


def forbidden(folder: Path) -> float:
    raise AssertionError("nothing needs to be built")


def test_entry_is_built_once_and_found_again(cache: EngineCache) -> None:
    folder, meta, found = cache.entry(IDENTITY, Path("g.onnx"), write)
    assert (found, meta.build_seconds, meta.identity) == (False, 1.5, IDENTITY)
    assert folder == cache.root / IDENTITY.key
    assert stat.S_IMODE(cache.root.stat().st_mode) == 0o700
    assert cache.entry(IDENTITY, Path("g.onnx"), forbidden) == (folder, meta, True)


@pytest.mark.parametrize(
    "change",
    [
        {"graph_sha256": "2" * 64},
        {"data_sha256": {"weights.bin": "2" * 64}},
        {"backend": "tensorrt"},
        {"library_version": "1.7.2"},
        {"target": "SM 12.0"},
        {"profile": BatchProfile(1, 4, 8)},
        {"options": BuildOptions(workspace_bytes=1 << 30)},
        {"options": BuildOptions(auxiliary_streams=0)},
    ],
)
def test_everything_an_engine_depends_on_changes_its_key(change: dict[str, object]) -> None:
    assert IDENTITY.model_copy(update=change).key != IDENTITY.key


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda folder: (folder / "engine.plan").write_text("other"), "engine.plan was changed after it was built"),
        (lambda folder: (folder / "audit.json").write_text("{}"), "audit.json was changed after it was built"),
        (lambda folder: (folder / "log.txt").unlink(), "log.txt is missing"),
        (lambda folder: (folder / "meta.json").unlink(), "meta.json cannot be read: No such file"),
        (lambda folder: (folder / "meta.json").write_text("{"), "meta.json is damaged"),
    ],
)
def test_damaged_entry_is_built_again(cache: EngineCache, damage: Callable[[Path], object], problem: str) -> None:
    folder, _, _ = cache.entry(IDENTITY, Path("g.onnx"), write)
    damage(folder)
    said: list[str] = []

    class Said:
        say = staticmethod(said.append)

    _, _, found = cache.entry(IDENTITY, Path("g.onnx"), write, progress=Said())  # type: ignore[arg-type]
    assert not found
    assert problem in said[0]
    assert (folder / "engine.plan").read_text() == "engine.plan"


def test_entry_moved_under_another_key_is_not_trusted(cache: EngineCache) -> None:
    other = IDENTITY.model_copy(update={"target": "SM 12.0"})
    folder, _, _ = cache.entry(other, Path("g.onnx"), write)
    os.rename(folder, cache.root / IDENTITY.key)
    (entry,) = cache.list_engines()
    assert entry.problem == "meta.json describes another engine"
    assert not cache.entry(IDENTITY, Path("g.onnx"), write)[2]


def test_failed_build_leaves_its_log_only(cache: EngineCache) -> None:
    def fail(folder: Path) -> float:
        (folder / "log.txt").write_text("what the builder said")
        raise EngineError("no")

    with pytest.raises(EngineError, match="no"):
        cache.entry(IDENTITY, Path("g.onnx"), fail)
    assert cache.failure_log(IDENTITY.key).read_text() == "what the builder said"
    assert cache.list_engines() == ()
    cache.entry(IDENTITY, Path("g.onnx"), write)
    assert not cache.failure_log(IDENTITY.key).exists()


def test_leftover_of_a_killed_process_is_removed(cache: EngineCache) -> None:
    cache.entry(IDENTITY.model_copy(update={"target": "SM 12.0"}), Path("g.onnx"), write)
    leftover = cache.root / f".{IDENTITY.key[:50]}.tmp-00000000"
    leftover.mkdir()
    cache.entry(IDENTITY, Path("g.onnx"), write)
    assert not leftover.exists()


def test_second_builder_waits_for_the_first(cache: EngineCache) -> None:
    building, go_on = threading.Event(), threading.Event()
    waiting: list[str] = []

    class Said:
        @staticmethod
        def say(message: str) -> None:
            waiting.append(message)
            go_on.set()

    def slow(folder: Path) -> float:
        building.set()
        assert go_on.wait(10)
        return write(folder)

    first = threading.Thread(target=cache.entry, args=(IDENTITY, Path("g.onnx"), slow))
    first.start()
    assert building.wait(10)
    _, _, found = cache.entry(IDENTITY, Path("g.onnx"), forbidden, progress=Said())  # type: ignore[arg-type]
    first.join()
    assert found
    assert waiting == ["another process is building this engine; waiting for it"]


def test_list_engines(cache: EngineCache) -> None:
    assert cache.list_engines() == ()
    cache.entry(IDENTITY, Path("g.onnx"), write)
    (entry,) = cache.list_engines()
    assert (entry.key, entry.size_bytes, entry.problem) == (IDENTITY.key, len("engine.plan"), None)
    assert entry.meta is not None
    assert entry.meta.graph == "g.onnx"


def test_cache_folder_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("QDM_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert EngineCache().root == tmp_path / ".cache/qdm-deploy/engines"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert EngineCache().root == tmp_path / "xdg/qdm-deploy/engines"
    monkeypatch.setenv("QDM_CACHE_DIR", str(tmp_path / "own"))
    assert EngineCache().root == tmp_path / "own/engines"


def test_cache_that_cannot_be_made_names_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cache = EngineCache(tmp_path / "file/engines")
    with pytest.raises(EnvironmentProblem, match=r"file/engines cannot be made \(Not a directory\); set QDM_CACHE_DIR"):
        cache.entry(IDENTITY, Path("g.onnx"), forbidden)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere; shows that a read-only cache is refused")
def test_read_only_cache_names_the_way_out(cache: EngineCache) -> None:
    cache.entry(IDENTITY, Path("g.onnx"), write)
    cache.root.chmod(0o500)
    with pytest.raises(EnvironmentProblem, match="cannot be written; set QDM_CACHE_DIR"):
        cache.entry(IDENTITY, Path("g.onnx"), forbidden)


def test_cache_that_others_can_write_is_refused(cache: EngineCache) -> None:
    cache.entry(IDENTITY, Path("g.onnx"), write)
    cache.root.chmod(0o777)
    with pytest.raises(EnvironmentProblem, match="with mode 0777: others could put their code into your engines"):
        cache.entry(IDENTITY, Path("g.onnx"), forbidden)
