"""``qdm-deploy verify``: whether a bundle is intact and computes here what it computed where it was built."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from qdm_deploy.cli.output import Output
from qdm_deploy.cli.verb import Verb, option
from qdm_deploy.errors import BundleError, CheckFailed

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["verify"]


@click.command(
    "verify",
    cls=Verb,
    short_help="Check a bundle's files and run its self-test.",
    examples=(
        "qdm-deploy verify fashion.qdm",
        "qdm-deploy verify fashion.qdm --backend onnxruntime",
        "qdm-deploy verify fashion.qdm -q && echo good",
    ),
)
@click.argument("bundle", type=click.Path(path_type=Path), help="Bundle made by `qdm-deploy build`.")
@option(
    "--backend",
    default="auto",
    metavar="NAME",
    help="auto, onnxruntime, openvino, tensorrt or tensorrt-rtx: where the self-test runs.",
)
@click.pass_obj
def verify(output: Output, bundle: Path, backend: str) -> int:
    """Compare every file with the manifest, then run the bundle's self-test on this machine.

    All findings are listed, not just the first. The exit code is 3 when a file is not as it was written, 1 when only
    the self-test fails, and 0 when the bundle is good.
    """
    from qdm_deploy.pipeline import verify as run

    found = run(bundle, backend, output.progress)
    failed = [check for check in found.selftest if not check.ok]

    def text(console: "Console") -> None:
        for finding in found.findings:
            console.print(f"damaged: {finding}", style="red")
        for check in found.selftest:
            console.print(
                f"{'ok' if check.ok else 'failed'}: {check.name}: {check.detail}", style="" if check.ok else "red"
            )
        console.print(
            f"{bundle} is {'good' if found.ok else 'NOT good'}", style="bold green" if found.ok else "bold red"
        )

    output.result(
        {"ok": found.ok, "findings": found.findings, "selftest": found.selftest},
        text,
        (*found.findings, *(f"{check.name}: {check.detail}" for check in failed)),
    )
    if found.findings:
        return BundleError.exit_code
    return 0 if found.ok else CheckFailed.exit_code
