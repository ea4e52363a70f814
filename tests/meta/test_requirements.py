"""The dependency bounds and the pins agree."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# NVIDIA's full SDK is installed on GPU servers only, from NVIDIA's own index: nothing that `make` installs.
# ModelOpt is a peer that builds may read scales from; its tests are skipped without it.
# torch-fidelity brings torchvision, for three numbers that need weights which nobody can ship.
UNPINNED_EXTRAS = {"fid", "modelopt", "tensorrt"}


@pytest.fixture(scope="module")
def project(repository: Path) -> dict[str, object]:
    return tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def requirements(project: dict) -> dict[str, list[Requirement]]:
    groups = {"core": project["dependencies"], **project["optional-dependencies"]}
    return {name: [Requirement(line) for line in lines] for name, lines in groups.items()}


@pytest.fixture(scope="module")
def pin_lines(repository: Path) -> list[str]:
    lines = (repository / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if not line.startswith("#")]


def test_every_requirement_has_a_lower_bound(requirements: dict[str, list[Requirement]]) -> None:
    for requirement in (requirement for group in requirements.values() for requirement in group):
        assert ">=" in {bound.operator for bound in requirement.specifier}, str(requirement)


def test_pins_are_plain(pin_lines: list[str]) -> None:
    # No local version (it would bind to one build of torch), no URL, no index option.
    assert pin_lines
    assert [line for line in pin_lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line)] == []


def test_pins_lie_within_the_bounds(requirements: dict[str, list[Requirement]], pin_lines: list[str]) -> None:
    pins = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in pin_lines)}
    wanted = [item for group, items in requirements.items() if group not in UNPINNED_EXTRAS for item in items]
    outside = [str(item) for item in wanted if not item.specifier.contains(pins.get(canonicalize_name(item.name), "0"))]
    assert outside == [], "run `make lock`"
