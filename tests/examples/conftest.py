"""The example scripts, as a user finds them: a folder of scripts that import each other."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Script = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def datasets(repository: Path) -> Any:
    """The module ``examples/datasets.py``."""
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("example_datasets", repository / "examples" / "datasets.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def script(repository: Path) -> Script:
    """Runs an example by name in a process of its own."""

    def run(name: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, str(repository / "examples" / name), *map(str, arguments)]
        paths = [str(repository / part) for part in ("", "calibration", "export")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)

    return run
