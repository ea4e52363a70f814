"""The locks hold what pyproject.toml asks for, at the versions that the suite runs with, each file by its hash."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

EXTRAS = {
    "cpu": {"openvino", "serve"},
    "gpu-tensorrt": {"tensorrt", "serve"},
    "gpu-tensorrt-rtx": {"tensorrt-rtx", "serve"},
    "build-cpu": {"build", "openvino"},
    "build-cuda": {"build", "openvino"},
}


@pytest.fixture(scope="module")
def project(repository: Path) -> dict:
    return tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.mark.parametrize("name", EXTRAS)
def test_a_lock_covers_its_extras(name: str, locks: dict, project: dict) -> None:
    wanted = project["dependencies"] + [
        line for extra in EXTRAS[name] for line in project["optional-dependencies"][extra]
    ]
    missing = [
        str(requirement)
        for requirement in map(Requirement, wanted)
        if not requirement.specifier.contains(locks[name].get(canonicalize_name(requirement.name), ("0", 0))[0])
    ]
    assert missing == [], "run `make image-lock`"


def test_there_is_no_other_lock(locks: dict) -> None:
    assert set(locks) == set(EXTRAS)


@pytest.mark.parametrize("name", EXTRAS)
def test_every_package_has_a_hash(name: str, locks: dict) -> None:
    assert [package for package, (_, hashes) in locks[name].items() if not hashes] == []


@pytest.mark.parametrize("name", EXTRAS)
def test_versions_are_those_of_the_suite(name: str, locks: dict, repository: Path) -> None:
    lines = (repository / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {canonicalize_name(line.partition("==")[0]): line.partition("==")[2] for line in lines if "==" in line}
    different = {
        package: (version, pins[package])
        for package, (version, _) in locks[name].items()
        if package in pins and Version(version).public != pins[package]
    }
    assert different == {}, "run `make image-lock`"


@pytest.mark.parametrize("name", ["cpu", "gpu-tensorrt", "gpu-tensorrt-rtx"])
def test_what_serves_holds_no_build_library(name: str, locks: dict) -> None:
    assert set(locks[name]) & {"torch", "onnx", "onnx-ir", "onnxscript", "diffusers", "transformers"} == set()
