"""``qdm-deploy export-triton``: a model repository for Triton Inference Server."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from qdm_deploy.cli.output import Output
from qdm_deploy.cli.verb import Verb, option

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["export_triton"]


@click.command(
    "export-triton",
    cls=Verb,
    short_help="Write a model repository for Triton Inference Server.",
    examples=(
        "qdm-deploy export-triton fashion.qdm --out models",
        "qdm-deploy export-triton fashion.qdm --out models --backend tensorrt --max-batch 32",
    ),
)
@click.argument("bundle", type=click.Path(path_type=Path), help="Bundle made by `qdm-deploy build`.")
@option(
    "--out",
    required=True,
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Folder of the repository; it must not exist, except with --force.",
)
@option("--backend", default="onnxruntime", metavar="NAME", help="onnxruntime (CPU) or tensorrt (GPU).")
@option("--max-batch", type=int, default=16, metavar="N", help="Rows that Triton may put together.")
@option("--force", is_flag=True, help="Replace a repository of an earlier export.")
@click.pass_obj
def export_triton(output: Output, bundle: Path, out: Path, backend: str, max_batch: int, force: bool) -> None:
    """Write the denoising step as a Triton model; the client keeps the loop over the steps.

    Requests at different steps share Triton's batches. The README in the repository lists what a request holds. A
    TensorRT plan has to be built on the machine that runs it: the repository has the script.
    """
    from qdm_deploy.pipeline import export_triton as run

    made = run(bundle, out, backend, max_batch, force=force)

    def text(console: "Console") -> None:
        console.print(f"{made.model} in {made.repository}; see {made.repository / 'README.md'}")
        if made.plan is not None:
            console.print(f"{made.plan} must be built on the target machine: {made.plan.parents[1] / 'build_plan.sh'}")

    output.result(
        {
            "repository": made.repository,
            "model": made.model,
            "plan": made.plan,
        },
        text,
        [made.repository],
    )
