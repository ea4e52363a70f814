"""``qdm-deploy doctor``: what this machine can run."""

from typing import TYPE_CHECKING

import click

from qdm_deploy.cli.output import Output
from qdm_deploy.cli.verb import Verb

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["doctor"]

_STYLES = {"OK": "green", "WARN": "yellow", "FAIL": "bold red"}


@click.command(
    "doctor",
    cls=Verb,
    short_help="Say what this machine can run, and what to install for the rest.",
    examples=("qdm-deploy doctor", "qdm-deploy doctor --json", "qdm-deploy doctor -q    only what is not OK"),
)
@click.pass_obj
def doctor(output: Output) -> int:
    """Look at Python, CPU, memory, disk, the engine cache, the libraries and the GPU.

    Every line is OK, WARN (something works less well or not at all) or FAIL (qdm-deploy cannot run), with what to do.
    Nothing is changed. The exit code is 1 when a line is FAIL, otherwise 0.
    """
    from qdm_deploy.backends.doctor import examine
    from qdm_deploy.engines.cache import EngineCache

    findings = examine(EngineCache().root)
    failed = [finding for finding in findings if finding.status == "FAIL"]
    width = max(len(finding.name) for finding in findings)

    def text(console: "Console") -> None:
        from rich.text import Text

        for finding in findings:
            status = Text(f"{finding.status:<4}", style=_STYLES[finding.status])
            console.print(status, f"{finding.name:<{width}}  {finding.detail}")
            if finding.fix:
                console.print(f"{'':<{width + 7}}fix: {finding.fix}")
        counts = ", ".join(f"{sum(finding.status == status for finding in findings)} {status}" for status in _STYLES)
        console.print(f"\n{counts}: qdm-deploy {'cannot run here as it is' if failed else 'runs on this machine'}")

    output.result(
        {"ok": not failed, "findings": findings},
        text,
        (f"{found.status} {found.name}: {found.detail}" for found in findings if found.status != "OK"),
    )
    return 1 if failed else 0
