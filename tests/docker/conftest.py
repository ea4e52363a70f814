"""The folder docker/ and what its files say."""

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


@pytest.fixture(scope="session")
def docker(repository: Path) -> Path:
    """The folder docker/."""
    return repository / "docker"


@pytest.fixture(scope="session")
def locks(docker: Path) -> dict[str, dict[str, tuple[str, int]]]:
    """By the lock's name and the package's: its version and how many hashes it has."""
    return {path.stem.removeprefix("requirements-"): _read(path) for path in docker.glob("requirements-*.lock")}


def _read(path: Path) -> dict[str, tuple[str, int]]:
    packages = {}
    for entry in path.read_text(encoding="utf-8").replace("\\\n", " ").splitlines():
        if entry and not entry.startswith("#"):
            requirement, *hashes = entry.split(" --hash=")
            parsed = Requirement(requirement)
            (pin,) = parsed.specifier
            assert pin.operator == "==", entry
            assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", found.strip()) for found in hashes), entry
            packages[canonicalize_name(parsed.name)] = (pin.version, len(hashes))
    return packages
