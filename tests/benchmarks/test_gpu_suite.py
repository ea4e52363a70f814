"""The GPU suite where it can run without a GPU: what it says there, its timing on a CPU session, its graphs."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu_suite
import numpy as np
import pytest
from lib.gpu_timing import mixed_rows, run_ms

from qdm_deploy.artifacts.pipeline_spec import Denoiser
from qdm_deploy.artifacts.step_interface import StepInterface
from qdm_deploy.engines.gpu import Gpu
from qdm_deploy.runtime.session import StepOutput

HAS_DRIVER = Path("/proc/driver/nvidia/version").exists()


@pytest.mark.skipif(HAS_DRIVER, reason="a driver is here; shows what is said where there is none")
def test_without_a_gpu_nothing_is_measured_and_the_exit_code_says_so(repository: Path, tmp_path: Path) -> None:
    command = [sys.executable, repository / "benchmarks/gpu_suite.py", "x.qdm", "--out", tmp_path / "gpu.json"]
    environment = {"PYTHONPATH": ":".join(path for path in sys.path if path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout) == (4, "")
    assert (
        "nothing was measured: the backend 'tensorrt' works on a GPU, and this machine has no NVIDIA driver"
        in done.stderr
    )
    assert list(tmp_path.iterdir()) == []


def test_what_was_measured_is_kept_when_the_process_ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def engine(backend: str, graph: Path, *_: object) -> dict[str, Any]:
        if graph.name == "float":
            raise SystemExit("as a crash in native code")
        return {"kernels": 7}

    bundle = SimpleNamespace(graph=Path, pipeline=SimpleNamespace(denoiser=SPEC))
    monkeypatch.setattr(gpu_suite, "installed_gpu", lambda backend: Gpu("Test GPU", "8.9", "CUDA 13.0"))
    monkeypatch.setattr(gpu_suite.Bundle, "open", lambda path: bundle)
    monkeypatch.setattr(gpu_suite, "_switched", lambda *_: {})
    monkeypatch.setattr(gpu_suite, "_engine", engine)
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py", "x.qdm", "--out", str(tmp_path / "gpu.json")])
    with pytest.raises(SystemExit, match="native code"):
        gpu_suite.main()
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert (found["gpu"]["name"], found["tensorrt"]) == ("Test GPU", {"bundle": {"kernels": 7}})


class Rows:
    """A step whose answer is its sample and timestep; ``mixing`` makes a row depend on its neighbours."""

    def __init__(self, mixing: float = 0.0) -> None:
        self.mixing = mixing
        self.runs = 0

    def run(self, inputs: Any) -> StepOutput:
        self.runs += 1
        steps = inputs["timestep"].astype(np.float32) + np.float32(self.mixing) * inputs["timestep"].mean()
        result = inputs["sample"] + steps[:, None, None, None]
        return StepOutput(result, result, inputs["history"])


SPEC = Denoiser(interface=StepInterface.of((1, 2, 2), coefficients=13), num_train_timesteps=100)


def test_rows_that_depend_on_their_neighbours_are_seen() -> None:
    found = mixed_rows(Rows(), SPEC, 4, runs=3)  # type: ignore[arg-type]
    assert found["largest_difference"] == 0.0
    assert found["mixed"]["runs"] == found["same"]["runs"] == 3
    assert mixed_rows(Rows(mixing=0.5), SPEC, 4, runs=1)["largest_difference"] > 0.1  # type: ignore[arg-type]


def test_a_step_is_warmed_up_and_then_timed() -> None:
    session = Rows()
    summary = run_ms(session, SPEC, 2, runs=4)  # type: ignore[arg-type]
    assert session.runs == 4 + 5
    assert 0 < summary["median"] <= summary["p95"]
