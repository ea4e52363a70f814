"""``qdm-deploy compare``: how far apart two bundles, backends or precisions are."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qdm_deploy.cli.output import Output
from qdm_deploy.cli.sampling import sampling_options
from qdm_deploy.cli.tables import db, print_table
from qdm_deploy.cli.verb import Verb, option
from qdm_deploy.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from qdm_deploy.report.model import QualityRow

__all__ = ["compare"]

_PRECISION = click.Choice(["int8", "float"])


@click.command(
    "compare",
    cls=Verb,
    short_help="Measure how far apart two bundles, backends or precisions are.",
    examples=(
        "qdm-deploy compare a.qdm b.qdm",
        "qdm-deploy compare a.qdm --precision-a float                     INT8 beside its own float reference",
        "qdm-deploy compare a.qdm --backend-a onnxruntime --backend-b openvino --out strip.png",
    ),
)
@click.argument("a", metavar="A", type=click.Path(path_type=Path), help="Bundle that is the reference.")
@click.argument(
    "b",
    metavar="[B]",
    required=False,
    type=click.Path(path_type=Path),
    help="Bundle that is measured against it.  [default: A, on another backend or in another precision]",
)
@option(
    "--backend-a",
    default="auto",
    metavar="NAME",
    help="auto, onnxruntime, openvino, tensorrt or tensorrt-rtx: where A runs.",
)
@option("--backend-b", default="auto", metavar="NAME", help="The same for B.")
@option("--precision-a", type=_PRECISION, default="int8", help="Graph of A that runs.")
@option("--precision-b", type=_PRECISION, default="int8", help="Graph of B that runs.")
@option("--out", type=click.Path(path_type=Path), help="Write a picture strip to this PNG file: A, B, difference.")
@option("--force", is_flag=True, help="Replace that file.")
@option("--threads", type=int, help="CPU threads.  [default: all cores]")
@option("-n", "--samples", type=int, default=16, section="Sampling", help="How many samples.")
@option("--seed", type=int, default=0, section="Sampling", help="Seed of the first sample; the others count up.")
@sampling_options()
@click.pass_obj
def compare(output: Output, /, b: Path | None, **options: Any) -> None:
    """Sample from A and B with the same seeds and print the error of B in decibels, step by step.

    The model error feeds both with A's samples, so a step's error is its own; the sample error lets both run freely, so
    errors add up as they do in use.
    """
    from qdm_deploy.pipeline import CompareOptions
    from qdm_deploy.pipeline import compare as run

    if b is None and all(options[f"{what}_a"] == options[f"{what}_b"] for what in ("backend", "precision")):
        raise InputError(
            "one bundle was given, and A and B run it alike; give another bundle, or another backend or precision for "
            "one of them (--backend-a, --backend-b, --precision-a, --precision-b)"
        )
    found = run(CompareOptions(b=b or options["a"], **options), output.progress)
    row = found.quality

    def text(console: "Console") -> None:
        print_table(
            console,
            "error of B after each step, as signal to noise",
            (">timestep", ">model", ">sample"),
            (
                (str(timestep), db(model), db(sample))
                for timestep, model, sample in zip(row.timesteps, row.eps_sqnr_db, row.state_sqnr_db, strict=True)
            ),
        )
        console.print()
        console.print("\n".join(_summary(row)))
        if found.strip is not None:
            console.print(f"images: {found.strip}")

    output.result(
        {"quality": row, "backend_a": found.backend_a, "backend_b": found.backend_b, "strip": found.strip},
        text,
        _summary(row),
    )


def _summary(row: "QualityRow") -> list[str]:
    lines = [
        f"model SQNR, mean over steps: {db(row.eps_sqnr_mean_db)} (worst step {db(row.eps_sqnr_min_db)})",
        f"sample SQNR at the end: {db(row.state_sqnr_final_db)}",
    ]
    if row.psnr_db:
        lines.append(f"image PSNR, mean: {db(row.psnr_mean_db)} (worst image {db(row.psnr_min_db)})")
    return lines
