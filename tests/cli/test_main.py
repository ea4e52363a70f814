import errno
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import pytest

from qdm_deploy import errors
from qdm_deploy.cli.failures import EXIT_CODES, Failure, Terminated, failure_of
from qdm_deploy.cli.main import cli

VERBS = [
    "build",
    "generate",
    "batch",
    "serve",
    "inspect",
    "verify",
    "compare",
    "evaluate",
    "engine",
    "export-triton",
    "healthcheck",
    "doctor",
]

Run = Callable[..., subprocess.CompletedProcess[str]]
Invoke = Callable[..., Any]
OneDocument = Callable[[str], dict[str, Any]]


def test_help_lists_the_commands_in_working_order_and_the_exit_codes(invoke: Invoke) -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    assert re.findall(r"^  ([a-z][a-z-]*)  +[A-Z]", result.output, re.MULTILINE) == VERBS
    for code, meaning in EXIT_CODES.items():
        assert f"{code:>3}  {meaning}" in result.output


def test_every_exit_code_of_an_error_is_documented() -> None:
    codes = {getattr(errors, name).exit_code for name in errors.__all__}
    assert codes < set(EXIT_CODES)


@pytest.mark.parametrize("verb", [*VERBS, "engine build", "engine list", "engine prune"])
def test_help_of_a_command_explains_every_option_and_shows_examples(verb: str, invoke: Invoke) -> None:
    result = invoke(*verb.split(), "--help")
    assert result.exit_code == 0
    assert f"Examples:\n  qdm-deploy {verb}" in result.output
    for option in ("--json", "--quiet", "--debug"):
        assert option in result.output
    command: click.Command = cli
    for word in verb.split():
        assert isinstance(command, click.Group)
        command = command.commands[word]
    for parameter in command.params:
        assert getattr(parameter, "help", None), f"{verb} {parameter.name} has no help"
        assert (parameter.opts[0] if isinstance(parameter, click.Option) else parameter.name.upper()) in result.output


def test_the_installed_script_and_the_module_are_the_same_program(run: Run) -> None:
    script = Path(sys.executable).with_name("qdm-deploy")
    if not script.exists():
        pytest.skip("qdm-deploy is not installed into this environment, so its script is not tried")
    installed = subprocess.run([script, "--version"], capture_output=True, text=True, check=True).stdout
    assert installed == run("--version").stdout == f"qdm-deploy, version {version('qdm-deploy')}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["build", "--help"], ["build"], ["doctor", "--nonsense"]])
def test_nothing_heavy_is_loaded_to_say_something_light(arguments: list[str]) -> None:
    program = (
        "import sys\n"
        "from qdm_deploy.cli.main import cli\n"
        "try:\n    cli.main(sys.argv[1:])\n"
        "except SystemExit:\n    print(' '.join(sorted({name.partition('.')[0] for name in sys.modules})))\n"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "click" in loaded
    assert loaded & {"torch", "onnx", "onnxruntime", "openvino", "diffusers", "numpy", "pydantic"} == set()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["doctr"], "No such command 'doctr'. Did you mean 'doctor'?"),
        (["doctor", "--jsn"], "No such option '--jsn'. Did you mean '--json'?"),
        (["inspect"], "Missing argument 'BUNDLE'"),
        (["generate", "x.qdm"], "Missing option '--out'"),
        (["generate", "x.qdm", "--out", "o", "--steps", "many"], "'many' is not a valid integer"),
        (["build", "--int8", "--recipe", "defualt"], "there is no recipe 'defualt' (did you mean default?)"),
        (["recipe", "show", "w4a9"], "there is no recipe 'w4a9' (did you mean w4a8?)"),
        (["build", "--int8", "--targets", "openvino,,tensorrt"], "'openvino,,tensorrt' has an empty entry"),
        (["engine", "build", "x.qdm", "--profile", "1,4"], "'1,4' is not three batch sizes; write MIN,OPT,MAX"),
        (["build"], "no precision was given; today there is one, INT8: add --int8"),
    ],
)
def test_usage_errors_go_to_stderr_and_exit_2(
    arguments: list[str], said: str, invoke: Invoke, one_document: OneDocument
) -> None:
    result = invoke(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in re.sub(r"\s+", " ", result.stderr)

    result = invoke(*arguments, "--json")
    document = one_document(result.stdout)
    assert (result.exit_code, document["error"]["code"], result.stderr) == (2, 2, "")
    assert document["error"]["type"] in ("UsageError", "InputError")
    assert said in document["error"]["message"]
    words = 2 if arguments[0] == "engine" else 1
    assert document["command"] == (" ".join(arguments[:words]) if arguments[0] in VERBS else None)


def test_no_command_shows_the_help(invoke: Invoke, one_document: OneDocument) -> None:
    result = invoke()
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Commands:" in result.stderr
    assert one_document(invoke("--json").stdout)["error"]["type"] == "UsageError"


def test_switches_may_stand_before_or_behind_the_command(invoke: Invoke, one_document: OneDocument) -> None:
    before, behind = (one_document(invoke(*line).stdout) for line in (("--json", "build"), ("build", "--json")))
    assert before == behind
    assert before["error"] == {
        "code": 2,
        "type": "InputError",
        "message": "no precision was given; today there is one, INT8: add --int8",
    }


@pytest.mark.parametrize("name", [name for name in errors.__all__ if name != "QdmError"])
def test_each_error_has_its_code_and_its_name(name: str) -> None:
    kind = getattr(errors, name)
    assert failure_of(kind("what and why")) == Failure(kind.exit_code, name, "what and why")


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (KeyboardInterrupt(), Failure(130, "Interrupted", "stopped; nothing was written")),
        (click.Abort(), Failure(130, "Interrupted", "stopped; nothing was written")),
        (Terminated(), Failure(143, "Terminated", "stopped by SIGTERM; nothing was written")),
        (
            MemoryError("Unable to allocate 9 GiB"),
            Failure(
                5, "ResourceProblem", "memory ran out (Unable to allocate 9 GiB): use a smaller batch, or free memory"
            ),
        ),
        (
            OSError(errno.ENOSPC, "No space left on device", "out/x.png"),
            Failure(5, "ResourceProblem", "disk space ran out: [Errno 28] No space left on device: 'out/x.png'"),
        ),
        (click.FileError("x"), Failure(2, "UsageError", "Could not open file 'x': unknown error")),
        (OSError(errno.EIO, "Input/output error"), None),
        (KeyError("x"), None),
    ],
)
def test_other_exceptions(error: BaseException, failure: Failure | None) -> None:
    assert failure_of(error) == failure


def test_an_unexpected_error_is_one_line_and_a_file(run_test_command: Run, tmp_path: Path) -> None:
    done = run_test_command("broken", env={"TMPDIR": str(tmp_path)})
    assert (done.returncode, done.stdout) == (70, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: RuntimeError: it broke; this is a fault of qdm-deploy. Please report it with")
    (saved,) = tmp_path.iterdir()
    assert f"{saved} (--debug shows it here)" in done.stderr
    text = saved.read_text()
    assert text.startswith(f"qdm-deploy {version('qdm-deploy')}, Python ")
    assert "qdm-deploy broken\n" in text
    assert text.endswith("RuntimeError: it broke\nover two lines\n")


def test_debug_shows_the_traceback_instead(run_test_command: Run, tmp_path: Path) -> None:
    done = run_test_command("broken", "--debug", env={"TMPDIR": str(tmp_path)})
    assert done.returncode == 70
    assert "Traceback (most recent call last)" in done.stderr
    assert "fault of qdm-deploy. Please report it with the traceback above" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_traceback_that_cannot_be_saved_is_shown(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def explode() -> None:
        raise ZeroDivisionError("no way")

    monkeypatch.setitem(cli.commands, "explode", click.Command("explode", callback=explode))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    result = invoke("explode")
    assert result.exit_code == 70
    assert "ZeroDivisionError: no way\n" in result.stderr
    assert "error: ZeroDivisionError: no way; this is a fault of qdm-deploy" in result.stderr


def test_an_unexpected_error_in_json(run_test_command: Run, one_document: OneDocument, tmp_path: Path) -> None:
    done = run_test_command("broken", "--json", env={"TMPDIR": str(tmp_path)})
    error = one_document(done.stdout)["error"]
    assert (done.returncode, error["code"], error["type"], done.stderr) == (70, 70, "InternalError", "")
    assert str(next(tmp_path.iterdir())) in error["message"]


def test_stdout_holds_the_result_and_nothing_that_libraries_print(
    run_test_command: Run, one_document: OneDocument
) -> None:
    noise = ["printed by a library", "written by native code", "printed by a child", "printed afterwards"]
    for arguments, expected in ((["noisy"], "the result\n"), (["noisy", "-q"], "brief\n")):
        done = run_test_command(*arguments)
        assert (done.returncode, done.stdout) == (0, expected)
        assert [line for line in noise if line not in done.stderr] == []
        assert ("working" in done.stderr) == (arguments == ["noisy"])
        assert "a library's warning" not in done.stderr
    assert one_document(run_test_command("noisy", "--json").stdout) == {
        "schema_version": "1.0",
        "command": "noisy",
        "value": [1, 2],
    }


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (signal.SIGINT, 130, "error: stopped; nothing was written\n"),
        (signal.SIGTERM, 143, "error: stopped by SIGTERM; nothing was written\n"),
    ],
)
def test_a_signal_stops_the_work_and_leaves_nothing(
    number: int, code: int, said: str, started: Callable[..., Any], tmp_path: Path
) -> None:
    with started("slow", "--folder", str(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        lines = iter(process.stderr.readline, "")
        assert any(line == "ready\n" for line in lines)
        process.send_signal(number)
        out, rest = process.communicate(timeout=30)
    assert (process.returncode, out, rest) == (code, "", said)
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_in_json(started: Callable[..., Any], one_document: OneDocument, tmp_path: Path) -> None:
    with started(
        "slow", "--json", "--folder", str(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert any(line == "ready\n" for line in iter(process.stderr.readline, ""))
        process.send_signal(signal.SIGINT)
        out, rest = process.communicate(timeout=30)
    assert rest == ""
    assert (process.returncode, one_document(out)["error"]["code"]) == (130, 130)


@pytest.mark.parametrize("command", [["long"], ["broken", "--json"], ["build", "--help"]])
def test_a_reader_that_leaves_is_no_error(command: list[str], started: Callable[..., Any], tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with started(*command, stdout=writer, stderr=subprocess.PIPE) as process:
        os.close(writer)
        assert process.communicate(timeout=30)[1] == ""
    assert process.returncode == (70 if command[0] == "broken" else 141)


def test_a_long_line_is_not_cut_where_there_is_no_terminal(run_test_command: Run) -> None:
    assert set(run_test_command("long").stdout.splitlines()) == {"line " * 20}


def test_a_closed_stdout_is_no_error(run_test_command: Run) -> None:
    program = "import os, sys; os.close(1); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    done = subprocess.run(
        [sys.executable, "-c", program, "-m", "qdm_deploy.cli.main", "doctor"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "")
    assert "Traceback" not in done.stderr
