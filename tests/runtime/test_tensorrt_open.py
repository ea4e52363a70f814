"""Opening a GPU session: where it ends on a machine without a GPU, and how an engine that cannot be loaded is handled.

The engines are real ones, cross-built by TensorRT-RTX; TensorRT-RTX refuses to load any engine without a driver, so the
loading itself is replaced where a test is about what happens around it.
"""

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qdm_deploy.backends.tensorrt import session as tensorrt_session
from qdm_deploy.backends.tensorrt.engine import StepEngine
from qdm_deploy.backends.tensorrt.session import open_tensorrt
from qdm_deploy.engines.cache import EngineCache
from qdm_deploy.engines.engine import engine_from_onnx
from qdm_deploy.engines.flavour import FLAVOURS
from qdm_deploy.engines.gpu import Gpu
from qdm_deploy.engines.request import BatchProfile
from qdm_deploy.errors import BundleError, EngineError, EngineRefused, EnvironmentProblem, InputError

HAS_DRIVER = Path("/proc/driver/nvidia/version").exists()
WITHOUT_DRIVER = pytest.mark.skipif(HAS_DRIVER, reason="a driver is here; shows what is said where there is none")
ADA = Gpu("NVIDIA L4", "8.9", "580.65.06 (CUDA 13.0)")

pytest.importorskip("tensorrt_rtx", reason="builds real engines: needs the extra 'tensorrt-rtx'")
pytest.importorskip("cuda.bindings.runtime", reason="opens sessions: needs the package cuda-bindings")


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path / "cache")


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Any:
    def here(gpu: Gpu) -> None:
        monkeypatch.setattr(tensorrt_session, "installed_gpu", lambda backend: gpu)

    return here


@WITHOUT_DRIVER
@pytest.mark.parametrize("backend", ["tensorrt-rtx"])
def test_without_a_driver_nothing_is_built(plain: Any, cache: EngineCache, backend: str) -> None:
    with pytest.raises(EnvironmentProblem, match=f"the backend '{backend}' works on a GPU, and this machine has no NV"):
        open_tensorrt(plain.graph, backend, cache=cache)
    assert not cache.root.exists()


@WITHOUT_DRIVER
def test_a_real_step_engine_is_built_and_then_refused_by_the_library(plain: Any, cache: EngineCache) -> None:
    engine = engine_from_onnx(plain.graph, cache=cache, planned=())
    with pytest.raises(EngineRefused, match=r"tensorrt-rtx 1\.7.* cannot load the engine .*cudaError 35"):
        StepEngine(FLAVOURS["tensorrt-rtx"], engine.path, SimpleNamespace())  # type: ignore[arg-type]


def test_hopper_is_sent_to_the_other_backend(plain: Any, cache: EngineCache, on: Any) -> None:
    on(Gpu("NVIDIA H100", "9.0", "CUDA 13.0"))
    with pytest.raises(
        InputError, match=r"cannot build for compute capability '9\.0'.*served by the backend 'tensorrt'"
    ):
        open_tensorrt(plain.graph, "tensorrt-rtx", cache=cache)


def test_a_missing_graph_is_named(cache: EngineCache, tmp_path: Path, on: Any) -> None:
    on(ADA)
    with pytest.raises(BundleError, match=r"the step graph .*none\.onnx does not exist"):
        open_tensorrt(tmp_path / "none.onnx", "tensorrt-rtx", cache=cache)


def test_an_old_library_is_refused(monkeypatch: pytest.MonkeyPatch, plain: Any, cache: EngineCache) -> None:
    monkeypatch.setattr(importlib.import_module("tensorrt_rtx"), "__version__", "1.1.9")
    with pytest.raises(
        EnvironmentProblem, match=r"'tensorrt-rtx' needs tensorrt_rtx 1\.2 or newer, and this is 1\.1\.9"
    ):
        open_tensorrt(plain.graph, "tensorrt-rtx", cache=cache)


class Sessions:
    """Stands for the session class: refuses the first ``failures`` engines it is given."""

    def __init__(self, *failures: Exception) -> None:
        self.failures = list(failures)
        self.plans: list[tuple[Path, float]] = []

    def __call__(self, flavour: Any, plan: Path, cuda: Any, **options: Any) -> Any:
        self.plans.append((plan, plan.stat().st_mtime))
        if self.failures:
            raise self.failures.pop(0)
        return options


def test_an_engine_from_the_cache_that_cannot_be_loaded_is_built_once_more(
    plain: Any, cache: EngineCache, on: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(ADA)
    sessions = Sessions()
    monkeypatch.setattr(tensorrt_session, "TensorRtSession", sessions)

    def open_() -> Any:
        return open_tensorrt(plain.graph, "tensorrt-rtx", profile=BatchProfile(1, 2, 4), cache=cache)

    assert open_()["gpu"] == ADA
    built = sessions.plans[0]
    sessions.failures = [EngineRefused("cannot load the engine")]
    open_()
    (refused, again) = sessions.plans[1:]
    assert refused == built
    assert again[0] == built[0]
    assert again[1] > built[1]

    sessions.failures = [EngineRefused("cannot load it"), EngineRefused("cannot load it either")]
    with pytest.raises(EngineError, match="cannot load it either"):
        open_()

    cache.prune(0)
    sessions.plans.clear()
    sessions.failures = [EngineRefused("cannot load what was just built")]
    with pytest.raises(EngineError, match="cannot load what was just built"):
        open_()
    assert len(sessions.plans) == 1


def test_an_engine_that_another_process_removed_is_built_again(
    plain: Any, cache: EngineCache, on: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(ADA)
    monkeypatch.setattr(tensorrt_session, "TensorRtSession", Sessions(FileNotFoundError("engine.plan")))
    assert open_tensorrt(plain.graph, "tensorrt-rtx", cache=cache)


def test_an_error_of_the_gpu_costs_no_engine(
    plain: Any, cache: EngineCache, on: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(ADA)
    engine = engine_from_onnx(plain.graph, cache=cache, planned=())
    monkeypatch.setattr(tensorrt_session, "TensorRtSession", Sessions(EngineError("all devices are busy")))
    with pytest.raises(EngineError, match="all devices are busy"):
        open_tensorrt(plain.graph, "tensorrt-rtx", cache=cache)
    assert engine.path.exists()
