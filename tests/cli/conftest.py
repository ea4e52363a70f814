"""Command lines run in this process or, as users run them, in their own; and commands that exist for tests only."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from qdm_deploy import pipeline
from qdm_deploy.cli.main import cli

ROOT = Path(__file__).parents[2]

# Commands of the test, added to the real program in a process of their own.
PROGRAM = """
import os, subprocess, sys, time, warnings
import click
from qdm_deploy.cli.main import cli, main
from qdm_deploy.cli.verb import Verb

@cli.command("noisy", cls=Verb)
@click.pass_obj
def noisy(output):
    print("printed by a library")
    os.write(1, b"written by native code\\n")
    subprocess.run([sys.executable, "-c", "print('printed by a child')"], check=True)
    warnings.warn("a library's warning")
    output.progress.say("working")
    output.result({"value": [1, 2]}, lambda console: console.print("the result"), ["brief"])
    print("printed afterwards")

@cli.command("slow", cls=Verb)
@click.option("--folder", default=".")
@click.pass_obj
def slow(output, folder):
    from qdm_deploy.artifacts.files import new_directory
    with new_directory(__import__("pathlib").Path(folder, "made")) as made, output.progress.task("waiting", 100):
        (made / "file").write_text("half")
        print("ready", flush=True)
        time.sleep(60)

@cli.command("broken", cls=Verb)
def broken():
    raise RuntimeError("it broke\\nover two lines")

@cli.command("long", cls=Verb)
@click.pass_obj
def long(output):
    output.result({}, lambda console: [console.print("line " * 20) for _ in range(20000)], [])

main()
"""


def environment(**changes: str) -> dict[str, str]:
    plain = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
    return plain | changes


@pytest.fixture
def run() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the program as its users do."""

    def start(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "qdm_deploy.cli.main", *arguments]
        settings = {"cwd": ROOT, "env": environment(), "capture_output": True, "text": True} | options
        return subprocess.run(command, check=False, timeout=300, **settings)

    return start


@pytest.fixture
def run_test_command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the program with the commands of ``PROGRAM`` added."""

    def start(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        settings = {"cwd": ROOT, "env": environment(), "capture_output": True, "text": True} | options
        return subprocess.run([sys.executable, "-c", PROGRAM, *arguments], check=False, timeout=60, **settings)

    return start


@pytest.fixture
def started() -> Callable[..., Any]:
    """Starts the program with the commands of ``PROGRAM`` added, without waiting for its end."""

    @contextmanager
    def start(*arguments: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
        settings = {"cwd": ROOT, "env": environment(), "text": True} | options
        with subprocess.Popen([sys.executable, "-c", PROGRAM, *arguments], **settings) as process:
            try:
                yield process
            finally:
                process.kill()

    return start


@pytest.fixture
def invoke() -> Callable[..., Result]:
    """Runs a command line in this process."""

    def call(*arguments: str) -> Result:
        return CliRunner().invoke(cli, list(arguments))

    return call


@pytest.fixture
def one_document() -> Callable[[str], dict[str, Any]]:
    """The one JSON document that the text must be."""

    def parse(text: str) -> dict[str, Any]:
        assert text.count("\n") == 1
        assert text.endswith("\n")
        document = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        assert list(document)[:2] == ["schema_version", "command"]
        assert document["schema_version"] == "1.0"
        return document

    return parse


@pytest.fixture
def replace(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable[..., Any]], None]:
    """Puts a function of the test in the place of one of the pipeline's."""

    def put(name: str, function: Callable[..., Any]) -> None:
        monkeypatch.setattr(pipeline, name, function)

    return put
