"""The Dockerfile, what it may see of the checkout, and the scripts around it."""

import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

SCRIPTS = ("install.sh", "wheelhouse.sh", "lock.sh", "in_image.sh", "test_image.sh")


def instructions(dockerfile: Path) -> list[str]:
    """One string an instruction, comments left out."""
    lines = [line for line in dockerfile.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
    return [re.sub(r"\s+", " ", text).strip() for text in "\n".join(lines).replace("\\\n", " ").splitlines() if text]


def test_hadolint_finds_nothing(docker: Path) -> None:
    hadolint = shutil.which("hadolint", path=Path(sys.executable).parent)
    assert hadolint, "hadolint is installed with the extra dev"
    done = subprocess.run([hadolint, "--no-color", docker / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_targets_exist_and_cpu_is_the_default(docker: Path) -> None:
    stages = [text.split()[-1] for text in instructions(docker / "Dockerfile") if text.startswith("FROM ")]
    assert {"cpu", "gpu", "build", "gpu-tensorrt", "gpu-tensorrt-rtx"} <= set(stages)
    assert stages[-1] == "cpu"


def test_no_stage_that_runs_is_root(docker: Path) -> None:
    stage, users, bases = "", {}, {}
    for text in instructions(docker / "Dockerfile"):
        word, *rest = text.split()
        if word == "FROM":
            stage, bases[rest[-1]] = rest[-1], rest[0].replace("${TENSORRT}", "tensorrt")
        elif word == "USER":
            users[stage] = rest[0]

    def user(name: str) -> str | None:
        return users.get(name) or (user(bases[name]) if name in bases else None)

    # A number: Kubernetes' runAsNonRoot cannot judge a name.
    assert {user(target) for target in ("cpu", "gpu", "build")} == {"10001:10001"}


def test_the_build_sees_what_it_copies_and_nothing_else(docker: Path, repository: Path) -> None:
    lines = [
        line for line in (repository / ".dockerignore").read_text(encoding="utf-8").splitlines() if line[:1] != "#"
    ]
    assert lines[0] == "*"
    allowed = [line.removeprefix("!").rstrip("/") for line in lines[1:]]
    assert all(line.startswith("!") for line in lines[1:])

    copied = set()
    for text in instructions(docker / "Dockerfile"):
        if text.startswith(("COPY ", "ADD ")) and "--from=" not in text:
            copied |= set(text.split()[1:-1])
        copied |= set(re.findall(r"--mount=type=bind,source=([^, ]+)", text))
    assert copied
    assert {path for path in copied if not any(fnmatch(path, pattern) for pattern in allowed)} == set()
    assert set(allowed) <= copied, "allowed, but not used"


def test_no_file_names_a_registry_or_an_index(docker: Path, repository: Path) -> None:
    files = [path for path in docker.rglob("*") if path.is_file() and path.suffix != ".md"]
    assert repository / "docker/requirements-cpu.lock" in files
    host = re.compile(
        r"https?://(?!127\.0\.0\.1)|\b(?:docker|quay|ghcr|gcr|nvcr|pypi|pythonhosted|pytorch)\.(?:io|org|com)\b"
    )
    found = {path.name: host.findall(path.read_text(encoding="utf-8")) for path in files}
    assert {name: hosts for name, hosts in found.items() if hosts} == {}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_parses_and_can_be_run(name: str, docker: Path) -> None:
    script = docker / name
    shell = script.read_text(encoding="utf-8").partition("\n")[0].rpartition("/")[2].split()[-1]
    done = subprocess.run([shell, "-n", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert script.stat().st_mode & 0o111


def test_the_image_test_says_where_it_cannot_run(docker: Path, tmp_path: Path) -> None:
    for tool in ("bash", "dirname"):
        (tmp_path / tool).symlink_to(str(shutil.which(tool)))
    done = subprocess.run(
        [docker / "test_image.sh"], env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("image test skipped: there is no buildah here")
    assert done.stdout.count("\n") == 1


def test_an_unknown_wheelhouse_is_refused(docker: Path) -> None:
    done = subprocess.run([docker / "wheelhouse.sh", "tpu"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "there is no docker/requirements-tpu.lock; choose one of:" in done.stderr
    assert "requirements-cpu.lock" in done.stderr


def test_readme_names_files_targets_and_commands_that_exist(docker: Path, repository: Path) -> None:
    readme = (docker / "README.md").read_text(encoding="utf-8")
    makefile = (repository / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"\bdocker/[\w./*-]*\w", readme))
    assert {"docker/test_image.sh", "docker/smoke_test.py", "docker/k8s/cpu"} <= named
    assert [path for path in named if not (repository / path).exists()] == []
    targets = set(re.findall(r"\bmake ([a-z][a-z-]*)", readme))
    assert {"image", "image-lock"} <= targets
    assert [name for name in targets if not re.search(rf"^{name}:", makefile, re.MULTILINE)] == []

    from qdm_deploy.cli.main import cli

    commands = re.findall(r"qdm-deploy:(?:cpu|gpu|build) ([a-z]+)", readme)
    assert {"generate", "build", "doctor"} <= set(commands)
    assert set(commands) | {"serve", "healthcheck"} <= set(cli.commands)
