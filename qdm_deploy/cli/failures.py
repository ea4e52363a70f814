"""From an exception to a message and an exit code."""

import errno
import os
import platform
import shlex
import sys
import tempfile
import traceback
from dataclasses import dataclass
from importlib.metadata import version

import click

from qdm_deploy.cli.output import document_text
from qdm_deploy.cli.verb import Settings
from qdm_deploy.errors import QdmError

__all__ = ["EXIT_CODES", "Failure", "Terminated", "failure_of", "show_failure"]

EXIT_CODES = {
    0: "all went well",
    1: "checks found problems: do not ship, a failed self-test, a FAIL of the doctor",
    2: "the command line or an input cannot be used",
    3: "the bundle is damaged, incomplete or too new",
    4: "this machine lacks something: a module, a GPU, a writable folder",
    5: "disk or memory ran out",
    70: "a fault of qdm-deploy itself",
    75: "stopped by a scheduler before the end: run the same command again",
    130: "stopped by Ctrl-C (143: by SIGTERM, 141: the reader of the output left)",
}

_USAGE, _RESOURCES, _INTERNAL, _INTERRUPTED, _READER_GONE, _TERMINATED = 2, 5, 70, 130, 141, 143
_OUT_OF = {errno.ENOSPC: "disk space", errno.EDQUOT: "disk quota", errno.ENOMEM: "memory"}


class Terminated(KeyboardInterrupt):
    """SIGTERM came: stop as with Ctrl-C, cleaning up on the way."""


@dataclass(frozen=True)
class Failure:
    """What the user is told.

    Attributes:
        code: exit code.
        type: name of the kind of error, stable for scripts.
        message: what happened and what to do.
    """

    code: int
    type: str
    message: str


def failure_of(error: BaseException) -> Failure | None:
    """What an exception means to the user; None for one that nobody expected."""
    if isinstance(error, QdmError):
        return Failure(error.exit_code, type(error).__name__, str(error))
    if isinstance(error, click.ClickException):
        return Failure(_USAGE, "UsageError", _usage_message(error))
    if isinstance(error, Terminated):
        return Failure(_TERMINATED, "Terminated", str(error) or "stopped by SIGTERM; nothing was written")
    if isinstance(error, KeyboardInterrupt | click.Abort):
        return Failure(_INTERRUPTED, "Interrupted", str(error) or "stopped; nothing was written")
    if isinstance(error, MemoryError):
        return Failure(_RESOURCES, "ResourceProblem", f"memory ran out ({error}): use a smaller batch, or free memory")
    if isinstance(error, OSError) and error.errno in _OUT_OF:
        return Failure(_RESOURCES, "ResourceProblem", f"{_OUT_OF[error.errno]} ran out: {error}")
    return None


def show_failure(error: BaseException, settings: Settings) -> int:
    """Tell the user about an exception, on stderr, and as JSON where that was asked for; returns the exit code."""
    if isinstance(error, BrokenPipeError):
        _drop_stdout()
        return _READER_GONE
    failure = failure_of(error)
    if settings.debug:
        traceback.print_exception(error, file=sys.stderr)
    if failure is None:
        failure = Failure(_INTERNAL, "InternalError", _internal_message(error, settings))
    try:
        if settings.json:
            facts = {"code": failure.code, "type": failure.type, "message": failure.message}
            click.echo(document_text(settings.command, {"error": facts}), nl=False)
        elif isinstance(error, click.ClickException):
            error.show()
        else:
            click.echo(f"{click.style('error:', fg='red', bold=True)} {failure.message}", err=True, color=_color())
    except BrokenPipeError:
        _drop_stdout()
    return failure.code


def _usage_message(error: click.ClickException) -> str:
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        return f"'{error.ctx.command_path}' needs a command or arguments; see '{error.ctx.command_path} --help'"
    return error.format_message()


def _internal_message(error: BaseException, settings: Settings) -> str:
    """One line for the user; the traceback goes to a file, for whoever repairs it."""
    what = f"{type(error).__name__}: {error}".splitlines()[0]
    if settings.debug:
        return f"{what}; this is a fault of qdm-deploy. Please report it with the traceback above"
    head = (
        f"qdm-deploy {version('qdm-deploy')}, Python {platform.python_version()}, {platform.platform()}\n"
        f"{shlex.join(['qdm-deploy', *settings.arguments])}\n\n"
    )
    text = head + "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="qdm-deploy-", suffix=".txt", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as file:
            file.write(text)
    except OSError:
        click.echo(text, err=True)
        return f"{what}; this is a fault of qdm-deploy. Please report it with the traceback above"
    return f"{what}; this is a fault of qdm-deploy. Please report it with {file.name} (--debug shows it here)"


def _drop_stdout() -> None:
    # The interpreter flushes stdout once more at its end and would complain about the reader that left.
    if sys.stdout is sys.__stdout__ and sys.stdout is not None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _color() -> bool | None:
    return False if os.environ.get("NO_COLOR") else None
