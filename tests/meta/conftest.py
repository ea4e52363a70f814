"""The repository as git sees it, and the wheel it builds."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def committed_files(repository: Path) -> list[Path]:
    """Relative paths of all files that are tracked, or would be by ``git add``; none that git ignores."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=repository, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return sorted({Path(name) for name in listing.stdout.split("\0") if name and (repository / name).is_file()})


@pytest.fixture(scope="session")
def wheel(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, built by the backend that pip would call."""
    out = tmp_path_factory.mktemp("wheel")
    build = "import sys, hatchling.build; hatchling.build.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(out)], cwd=repository, check=True, capture_output=True)
    (built,) = out.glob("*.whl")
    return built
