"""``qdm-deploy evaluate``: whether the INT8 model is as good as its reference."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qdm_deploy.cli.output import Output
from qdm_deploy.cli.sampling import sampling_options
from qdm_deploy.cli.tables import print_table
from qdm_deploy.cli.verb import Verb, option

if TYPE_CHECKING:
    from rich.console import Console

    from qdm_deploy.report.evaluation import DistributionRow, Evaluation, PairedRow

__all__ = ["evaluate"]


@click.command(
    "evaluate",
    cls=Verb,
    short_help="Judge the INT8 model against its float reference, by seeds and by distribution.",
    examples=(
        "qdm-deploy evaluate fashion.qdm",
        "qdm-deploy evaluate fashion.qdm --num 10000 --out evaluation.json    also writes evaluation.html",
        "qdm-deploy evaluate new.qdm --against old.qdm --backend openvino",
        "qdm-deploy evaluate cifar.qdm --inception-weights inception.safetensors --real-images pictures",
    ),
)
@click.argument("bundle", type=click.Path(path_type=Path), help="Bundle whose INT8 model is judged: B.")
@option("--against", default="fp32", metavar="fp32|BUNDLE2", help="The reference A: its own float graph, or a bundle.")
@option("--out", type=click.Path(path_type=Path), help="Write the result to this JSON file.")
@option(
    "--html",
    type=click.Path(path_type=Path),
    help="Write it as a page to this file.  [default: beside the JSON file]",
)
@option("--force", is_flag=True, help="Replace these files.")
@option("-n", "--num", type=int, default=1000, help="Images of each that are compared with real ones.")
@option("--paired", type=int, default=64, help="Seeds that are compared step by step.")
@option(
    "--features",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Classifier to compare with real images in.  [default: the shipped one, where it fits the model]",
)
@option(
    "--inception-weights",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Safetensors file of torch-fidelity's Inception-v3: also measure FID, Inception score and sFID (extra fid).",
)
@option(
    "--real-images",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Real pictures of the model's size, for these.",
)
@option(
    "--cache",
    type=click.Path(path_type=Path),
    help="Folder for images and features, from which an interrupted run goes on.  [default: the user's cache]",
)
@option(
    "--seed",
    type=int,
    default=2**41,
    section="Sampling",
    help="Seed of the first image; the others count up. The default is far from those that builds use.",
)
@sampling_options(steps=20)
@option(
    "--backend",
    default="auto",
    metavar="NAME",
    section="Runtime",
    help="auto, onnxruntime, openvino, tensorrt or tensorrt-rtx.",
)
@option("--batch-size", type=int, default=16, section="Runtime", help="Images denoised together.")
@option("--threads", type=int, section="Runtime", help="CPU threads.  [default: all cores]")
@click.pass_obj
def evaluate(output: Output, /, **options: Any) -> None:
    """Sample from the bundle (B) and its reference (A) with the same seeds, and say whether B is worse.

    Image by image: how far B is from A. As sets: how far each is from real images in a classifier's features, whether
    the difference is more than chance, and how far real images are from other real ones.
    """
    from qdm_deploy.pipeline import EvaluateOptions
    from qdm_deploy.pipeline import evaluate as run

    asked = EvaluateOptions(**options)
    found = run(asked, output.progress)
    written = [path for path in (asked.out, asked.page) if path is not None]

    def text(console: "Console") -> None:
        for name, side in (("A", found.a), ("B", found.b)):
            console.print(f"{name}: {side.bundle}, {side.precision} on {side.backend['backend']}")
        print_table(
            console,
            "B beside A, the same seeds",
            ("metric", ">seeds", ">mean", ">95 % interval", ">worst"),
            (_paired(row) for row in found.paired),
        )
        if found.distribution:
            print_table(
                console,
                f"beside real images, {found.images} of each",
                ("metric", ">A", ">B", ">B - A", ">95 % interval", ">real vs real"),
                (_distribution(row) for row in found.distribution),
            )
        console.print()
        console.print("\n".join(_summary(found)))
        for path in written:
            console.print(f"result: {path}")

    output.result({"evaluation": found, "out": asked.out, "html": asked.page}, text, _summary(found))


def _paired(row: "PairedRow") -> tuple[str, ...]:
    return row.metric, str(row.seeds), f"{row.mean:.4g}", f"{row.low:.4g} to {row.high:.4g}", f"{row.worst:.4g}"


def _distribution(row: "DistributionRow") -> tuple[str, ...]:
    interval = "-" if row.low is None or row.high is None else f"{row.low:+.4g} to {row.high:+.4g}"
    floor = "-" if row.floor is None else f"{row.floor:.4g}"
    return row.metric, f"{row.a:.4g}", f"{row.b:.4g}", f"{row.difference:+.4g}", interval, floor


def _summary(found: "Evaluation") -> list[str]:
    return [*found.notes, found.verdict]
