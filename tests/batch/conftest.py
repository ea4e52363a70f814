"""A bundle whose network is linear: it opens in milliseconds, and a shard takes about as long."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qdm_deploy.batch import BatchOptions, BatchResult, generate_batch


@pytest.fixture(scope="session")
def classes(write_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with five classes and a null label."""
    return write_bundle(tmp_path_factory.mktemp("bundles") / "classes.qdm", conditional=True)


@pytest.fixture(scope="session")
def plain(write_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unconditional bundle."""
    return write_bundle(tmp_path_factory.mktemp("bundles") / "plain.qdm")


QUICK: dict[str, Any] = {
    "count": 23,
    "shard_size": 6,
    "batch_size": 4,
    "steps": 2,
    "backend": "onnxruntime",
    "threads": 1,
}

Make = Callable[..., BatchResult]


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite may itself run under a launcher."""
    for name in ("SLURM_ARRAY_TASK_ID", "RANK", "WORLD_SIZE", "JOB_COMPLETION_INDEX", "JOB_COMPLETIONS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def quick() -> dict[str, Any]:
    """Options of a job of four shards, the last one short."""
    return QUICK


@pytest.fixture
def make(classes: Path) -> Make:
    """Runs a job in this process; keywords are those of ``BatchOptions``."""

    def run(out: Path, **changes: Any) -> BatchResult:
        return generate_batch(BatchOptions(**{**QUICK, "bundle": classes, "out": out, **changes}))

    return run


@pytest.fixture
def shards() -> Callable[[Path], dict[str, bytes]]:
    """The content of every file of a job that depends on nothing but the job: all but markers and the lock."""

    def read(out: Path) -> dict[str, bytes]:
        return {
            str(path.relative_to(out)): path.read_bytes()
            for path in sorted(out.rglob("*"))
            if path.is_file() and path.suffix != ".json" and path.name != ".lock"
        }

    return read
