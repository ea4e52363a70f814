"""Where output goes: the result to stdout, everything else to stderr."""

import contextlib
import io
import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from qdm_deploy.cli.progress import progress_on
from qdm_deploy.progress import SILENT, Progress

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["SCHEMA_VERSION", "Output", "document_text", "plain", "results_apart"]

SCHEMA_VERSION = "1.0"
_STDOUT, _STDERR = 1, 2
# A table in a pipe or a file is for grep: one line per row, nothing cut off.
_WIDTH_WITHOUT_TERMINAL = 400


class Output:
    """What a command prints through.

    Args:
        command: the command's name, for the JSON document.
        results: stdout.
        messages: stderr.
        json: print the result as JSON.
        quiet: print the shortest form of the result, and no progress.
        arguments: the command line behind the program's name.
    """

    def __init__(
        self,
        command: str,
        results: TextIO,
        messages: TextIO,
        *,
        json: bool = False,
        quiet: bool = False,
        arguments: tuple[str, ...] = (),
    ) -> None:
        self.command = command
        self._results = results
        self._json = json
        self.quiet = quiet
        self._arguments = arguments
        self.progress: Progress = SILENT if quiet else progress_on(messages)

    @property
    def command_line(self) -> str:
        """What was typed, ready to be pasted into a shell."""
        return shlex.join(["qdm-deploy", *self._arguments])

    def result(
        self, document: Mapping[str, object], text: Callable[["Console"], None], brief: Iterable[object]
    ) -> None:
        """Print the result, once: as JSON, as text for people, or in brief.

        Args:
            document: becomes the JSON document, together with the schema version and the command.
            text: prints to the console it is given.
            brief: lines of the shortest form.
        """
        if self._json:
            self._results.write(document_text(self.command, document))
        elif self.quiet:
            self._results.writelines(f"{line}\n" for line in brief)
        else:
            text(_console(self._results))
        self._results.flush()


def _console(stream: TextIO) -> "Console":
    from rich.console import Console

    width = None if stream.isatty() else _WIDTH_WITHOUT_TERMINAL
    return Console(file=stream, width=width, markup=False, emoji=False, highlight=False, soft_wrap=True)


def document_text(command: str | None, content: Mapping[str, object]) -> str:
    """The one JSON document of a command, as one line."""
    document = {"schema_version": SCHEMA_VERSION, "command": command, **{key: plain(content[key]) for key in content}}
    return json.dumps(document, ensure_ascii=False, allow_nan=False) + "\n"


def plain(value: Any) -> Any:
    """A value as JSON types: models, dataclasses, paths and arrays become objects, text and lists.

    NaN and infinity become null, which is what JSON has for them.

    Raises:
        TypeError: a type that none of this covers.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if hasattr(value, "model_dump"):
        return plain(value.model_dump(mode="json"))
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    raise TypeError(f"a {type(value).__name__} has no JSON form")


@contextmanager
def results_apart() -> Iterator[tuple[TextIO, TextIO]]:
    """Send all that is printed meanwhile to stderr, and hand out the real stdout and stderr.

    Exporters and engine builders print to stdout from Python and from native code; a reader of ours must get our result
    and nothing else. So the file descriptor itself is redirected where stdout is one.
    """
    results, messages = sys.stdout or io.StringIO(), sys.stderr or io.StringIO()
    with contextlib.redirect_stdout(messages):
        if not (_is_descriptor(results, _STDOUT) and _is_descriptor(messages, _STDERR)):
            yield results, messages
            return
        results.flush()
        saved = os.dup(_STDOUT)
        os.dup2(_STDERR, _STDOUT)
        try:
            with open(saved, "w", encoding=results.encoding, errors="replace", closefd=False) as stream:
                yield stream, messages
        finally:
            os.dup2(saved, _STDOUT)
            os.close(saved)


def _is_descriptor(stream: TextIO, number: int) -> bool:
    try:
        return stream.fileno() == number
    except io.UnsupportedOperation:
        return False
