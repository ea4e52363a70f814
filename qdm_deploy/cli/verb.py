"""What every command has in common: its switches, the layout of its help, and where its output goes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import click

from qdm_deploy.cli.output import Output, results_apart

__all__ = ["CommaList", "CountOrAuto", "Settings", "Verb", "VerbGroup", "common_switches", "option", "write_lines"]


@dataclass
class Settings:
    """What the switches say, gathered while the command line is parsed.

    Attributes:
        arguments: the command line behind the program's name.
        command: name of the command; None before it is known.
        json: print one JSON document instead of text.
        quiet: print the result only, in its shortest form.
        debug: show tracebacks.
    """

    arguments: tuple[str, ...] = ()
    command: str | None = None
    json: bool = False
    quiet: bool = False
    debug: bool = False


class _Option(click.Option):
    """An option that stands under a heading of the help page."""

    def __init__(self, *args: Any, section: str = "Options", **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.section = section


option = partial(click.option, cls=_Option, show_default=True)


class CommaList(click.ParamType[tuple[str, ...]]):
    """``a,b,c`` as a tuple of str, without blanks; an empty entry is refused."""

    name = "list"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """The entries of the value; a tuple (a default) is taken as it is."""
        if isinstance(value, tuple):
            return value
        entries = tuple(entry.strip() for entry in str(value).split(","))
        if not all(entries):
            self.fail(f"{value!r} has an empty entry; separate names by single commas", param, ctx)
        return entries


class CountOrAuto(click.ParamType[int | str]):
    """A number of something, or the word ``auto``."""

    name = "auto|N"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        """The number as int; a default is taken as it is."""
        text = str(value).strip()
        if text == "auto":
            return text
        try:
            return int(text)
        except ValueError:
            self.fail(f"{value!r} is neither a number nor auto", param, ctx)


def _switch(*names: str, help: str) -> click.Option:
    def remember(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
        # Before and after the command's name it means the same, so one must not undo the other.
        if value:
            setattr(ctx.ensure_object(Settings), str(parameter.name), True)

    return _Option(names, is_flag=True, expose_value=False, callback=remember, help=help, section="Common options")


def common_switches() -> list[click.Parameter]:
    """New instances of the switches that every command takes."""
    return [
        _switch("--json", help="Print exactly one JSON document to stdout; progress goes to stderr."),
        _switch("-q", "--quiet", help="No progress, and the result in its shortest form."),
        _switch("--debug", help="Show the traceback of an error."),
    ]


class Verb(click.Command):
    """One command: its function gets an ``Output`` as ``ctx.obj`` and returns its exit code, or None for 0.

    Args:
        examples: command lines for the help page.
        **attributes: of ``click.Command``.
    """

    def __init__(self, *args: Any, examples: Sequence[str] = (), **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.examples = tuple(examples)
        self.params += common_switches()

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Note which command it is before anything can go wrong with its arguments."""
        ctx.ensure_object(Settings).command = _words(ctx)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command with nothing but its result on stdout, whatever the libraries below it print."""
        settings = ctx.ensure_object(Settings)
        with results_apart() as (results, messages):
            ctx.obj = Output(
                str(settings.command),
                results,
                messages,
                json=settings.json,
                quiet=settings.quiet,
                arguments=settings.arguments,
            )
            return super().invoke(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """One section per heading, in the order of declaration."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and not isinstance(parameter, click.Argument):
                sections.setdefault(getattr(parameter, "section", "Common options"), []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The examples, as they are typed."""
        write_lines(formatter, "Examples", self.examples)


class VerbGroup(click.Group):
    """A command that is a group of commands.

    Args:
        examples: command lines for the help page.
        **attributes: of ``click.Group``.
    """

    def __init__(self, *args: Any, examples: Sequence[str] = (), **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.examples = tuple(examples)
        self.params += common_switches()

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Note which group it is before anything can go wrong with its arguments."""
        ctx.ensure_object(Settings).command = _words(ctx)
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands in the order in which they are used."""
        return list(self.commands)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The examples, as they are typed."""
        write_lines(formatter, "Examples", self.examples)


def _words(ctx: click.Context) -> str:
    """The command as it is typed, without the program: "build", "engine list"."""
    words: list[str] = []
    step: click.Context | None = ctx
    while step is not None and step.parent is not None:
        words.insert(0, str(step.info_name))
        step = step.parent
    return " ".join(words)


def write_lines(formatter: click.HelpFormatter, heading: str, lines: Iterable[str]) -> None:
    """A section of the help page whose lines are not wrapped."""
    with formatter.section(heading):
        for line in lines:
            formatter.write(f"  {line}\n")
