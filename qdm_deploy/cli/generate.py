"""``qdm-deploy generate``: images from a bundle."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qdm_deploy.cli.output import Output
from qdm_deploy.cli.progress import duration
from qdm_deploy.cli.sampling import sampling_options
from qdm_deploy.cli.verb import Verb, option

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["generate"]


@click.command(
    "generate",
    cls=Verb,
    short_help="Generate images with a bundle.",
    examples=(
        "qdm-deploy generate fashion.qdm -n 16 --out images",
        'qdm-deploy generate sd15.qdm -n 4 --prompt "a red fox in snow" --negative-prompt blurry --out foxes',
        "qdm-deploy generate fashion.qdm -n 4 --label sneaker --steps 20 --sampler dpmpp-2m --out sneakers",
        "qdm-deploy generate fashion.qdm --precision float --seed 7 --out reference",
    ),
)
@click.argument("bundle", type=click.Path(path_type=Path), help="Bundle made by `qdm-deploy build`.")
@option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder for the images; it must not exist, except with --force.",
)
@option("-n", "--count", type=int, default=16, help="How many images.")
@option("--seed", type=int, default=0, help="Seed of the first image; the others count up from it.")
@option(
    "--prompt",
    "--label",
    "prompt",
    metavar="TEXT",
    help="What to show: text, or a class by name or number.  [default: prompts of ours or all classes, in turn]",
)
@option("--negative-prompt", metavar="TEXT", help="What not to show; text models only.")
@option(
    "--prompts",
    "prompts_file",
    type=click.Path(path_type=Path),
    help="Text file of prompts to take in turn, one a line, a negative one behind a tab.",
)
@option("--clip-skip", type=int, help="Layers of the text encoder to leave out at its end: 0 or 1.")
@option("--weighting", is_flag=True, help="Read (word:1.2), (word) and [word] in prompts as weights.")
@option(
    "--output",
    type=click.Choice(["images", "latents"]),
    default="images",
    help="Pictures, or the finished samples in a safetensors file.",
)
@option("--force", is_flag=True, help="Replace images of an earlier run.")
@sampling_options()
@option(
    "--backend",
    default="auto",
    metavar="NAME",
    section="Runtime",
    help="auto, onnxruntime, openvino, tensorrt or tensorrt-rtx; auto is the faster CPU one, timed once.",
)
@option(
    "--precision",
    type=click.Choice(["auto", "int8", "float"]),
    default="auto",
    section="Runtime",
    help="Run the INT8 graph or the float reference; auto takes what is faster here.",
)
@option("--batch-size", type=int, default=16, section="Runtime", help="Images denoised together.")
@option("--threads", type=int, section="Runtime", help="CPU threads.  [default: all cores]")
@click.pass_obj
def generate(output: Output, /, **options: Any) -> None:
    """Denoise COUNT samples and write them as PNG files, with a contact sheet of all.

    The same seed gives the same image on every backend, whatever the batch size.
    """
    from qdm_deploy.pipeline import GenerateOptions
    from qdm_deploy.pipeline import generate as run

    chosen = GenerateOptions(**options)
    made = run(chosen, output.progress)

    def text(console: "Console") -> None:
        if made.images:
            console.print(f"{len(made.images)} images in {chosen.out}, on one sheet: {made.sheet}")
        else:
            console.print(f"{len(made.seeds)} samples in {made.sheet}")
        speed = f"{duration(made.seconds)}, {made.images_per_second:.2f} images per second"
        console.print(f"{speed} on {made.backend['backend']}, {made.precision}")

    output.result(
        {
            "images": made.images,
            "sheet": made.sheet,
            "seeds": made.seeds,
            "seconds": made.seconds,
            "images_per_second": made.images_per_second,
            "backend": made.backend,
            "precision": made.precision,
        },
        text,
        made.images or (made.sheet,),
    )
