"""What an installation puts on somebody's disk, and whether it works there."""

import os
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path, PurePosixPath

import pytest

SOURCE_ROOTS = {"qdm_deploy": "", "qdm_calibration": "calibration", "qdm_export": "export"}

IMPORT_EVERYTHING = """
import importlib, pkgutil, sys
import qdm_deploy
for module in pkgutil.walk_packages(qdm_deploy.__path__, "qdm_deploy."):
    # What the folder http holds needs the extra serve.
    if not module.name.endswith("__main__") and not module.name.startswith("qdm_deploy.serving.http."):
        importlib.import_module(module.name)
print(qdm_deploy.__file__)
"""


def test_wheel_holds_exactly_the_files_of_the_three_packages(
    wheel: Path, repository: Path, committed_files: list[Path]
) -> None:
    expected = {
        path.relative_to(root).as_posix()
        for package, root in SOURCE_ROOTS.items()
        for path in committed_files
        if path.is_relative_to(Path(root, package))
    }
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    metadata = {name for name in names if PurePosixPath(name).parts[0].endswith(".dist-info")}

    assert names - metadata == expected
    assert {PurePosixPath(name).parts[0] for name in expected} == set(SOURCE_ROOTS)
    assert {f"{package}/py.typed" for package in SOURCE_ROOTS} <= expected
    assert {PurePosixPath(name).name for name in metadata} >= {"LICENSE", "entry_points.txt", "METADATA"}


def test_core_requirements_need_no_build_library(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        requirements = Parser().parsestr(archive.read(name).decode()).get_all("Requires-Dist", [])
    core = {requirement.split("<")[0].split(">")[0] for requirement in requirements if "extra ==" not in requirement}
    assert core == {"click", "numpy", "onnxruntime", "pillow", "pydantic", "rich", "safetensors", "tokenizers"}


@pytest.mark.parametrize("folder", [".", "calibration", "export", "docker", "tests", "benchmarks"])
def test_folder_is_no_package(folder: str, committed_files: list[Path]) -> None:
    # With an __init__.py, the repository's docker/ or export/ would shadow installed packages of these names.
    inside = [path for path in committed_files if path.parent == Path(folder) and path.name == "__init__.py"]
    assert inside == []


def test_no_test_folder_is_a_package(committed_files: list[Path]) -> None:
    assert [path for path in committed_files if path.parts[0] == "tests" and path.name == "__init__.py"] == []


@pytest.mark.slow
def test_wheel_works_with_the_core_dependencies_only(wheel: Path, repository: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    bin_folder = tmp_path / "venv" / "bin"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def run(*command: str | Path) -> str:
        done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command} returned {done.returncode}:\n{done.stdout}\n{done.stderr}"
        return done.stdout

    run(sys.executable, "-m", "venv", tmp_path / "venv")
    run(bin_folder / "python", "-m", "pip", "install", "--constraint", repository / "constraints.txt", wheel)

    installed = run(bin_folder / "python", "-m", "pip", "list", "--format=freeze").lower()
    assert not [line for line in installed.splitlines() if line.startswith(("torch", "onnx=", "onnx-ir", "diffusers"))]
    assert Path(run(bin_folder / "python", "-c", IMPORT_EVERYTHING).strip()).is_relative_to(tmp_path)
    assert "Usage:" in run(bin_folder / "qdm-deploy", "--help")
    assert "onnxruntime" in run(bin_folder / "qdm-deploy", "doctor").lower()
