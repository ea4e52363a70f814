"""A bundle whose network is linear: it opens in milliseconds, and a shard takes about as long."""

from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

from qdm_deploy.artifacts.bundle import BundleWriter
from qdm_deploy.artifacts.manifest import Compatibility
from qdm_deploy.batch import BatchOptions, BatchResult, generate_batch

SCHEDULER = """{
  "_class_name": "DDPMScheduler", "num_train_timesteps": 100, "beta_start": 0.001, "beta_end": 0.2,
  "beta_schedule": "linear", "prediction_type": "epsilon", "clip_sample": true, "variance_type": "fixed_small"
}
"""


@pytest.fixture(scope="session")
def linear(repository: Path) -> Any:
    """The module of linear step graphs that the tests of the runtime use."""
    spec = spec_from_file_location("linear_step_graphs", repository / "tests" / "runtime" / "conftest.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def write_bundle(linear: Any) -> Callable[..., Path]:
    """Writes a bundle with one linear graph for ONNX Runtime; keywords are those of ``write_tiny``."""

    def write(out: Path, *, float_below: int | None = None, **kind: bool) -> Path:
        with BundleWriter(out) as bundle:
            (bundle.root / "unet").mkdir()
            model = linear.write_tiny(bundle.root / "unet" / "onnxruntime.onnx", **kind).spec
            if float_below is not None:
                linear.write_tiny(bundle.root / "unet" / "float.onnx", **kind)
            (bundle.root / "scheduler").mkdir()
            (bundle.root / "scheduler" / "scheduler_config.json").write_text(SCHEDULER)
            bundle.publish(
                name=model.name,
                model=model,
                targets=["onnxruntime"],
                compatibility=Compatibility(opset=21, min_runtime="0.1"),
                provenance={},
                recipe={},
                float_below=float_below,
            )
        return out

    return write


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
