"""``qdm-deploy batch``: very many images from a bundle; ``batch status`` and ``batch verify`` look at them."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qdm_deploy.cli.output import Output
from qdm_deploy.cli.progress import duration
from qdm_deploy.cli.sampling import sampling_options
from qdm_deploy.cli.tables import size
from qdm_deploy.cli.verb import Verb, option, write_lines
from qdm_deploy.errors import CheckFailed

if TYPE_CHECKING:
    from rich.console import Console

    from qdm_deploy.batch import BatchStatus

__all__ = ["batch"]

_SWITCHES = ("--json", "-q", "--quiet", "--debug")
_MOST_FINDINGS = 20


@click.command(
    "status",
    cls=Verb,
    short_help="How far a job is.",
    examples=("qdm-deploy batch status samples", "qdm-deploy batch status samples --json"),
)
@click.argument("out", metavar="DIR", type=click.Path(path_type=Path), help="Folder of a `qdm-deploy batch` job.")
@click.pass_obj
def status(output: Output, out: Path) -> None:
    """Count the complete shards of DIR, say what is missing and how long that may take; from any machine, any time."""
    from qdm_deploy.batch import batch_status

    found = batch_status(out)
    output.result(
        {**_facts(found), "job": found.job, "running": found.running, "left_over": found.left_over,
         "seconds_left": found.seconds_left, "missing": found.missing, "cpus": found.cpus},
        lambda console: _print_status(console, found),
        [f"{found.shards} of {found.job.shards} shards, {found.images} of {found.job.count} images"],
    )  # fmt: skip


@click.command(
    "verify",
    cls=Verb,
    short_help="Read everything that a job made.",
    examples=("qdm-deploy batch verify samples", "qdm-deploy batch verify samples --discard    then run the job again"),
)
@click.argument("out", metavar="DIR", type=click.Path(path_type=Path), help="Folder of a `qdm-deploy batch` job.")
@option("--discard", is_flag=True, help="Let the next run make again what is not good.")
@click.pass_obj
def verify(output: Output, out: Path, discard: bool) -> int:
    """Compare every shard of DIR with its hash, and its pictures with those that belong there: no gap, no duplicate.

    The exit code is 1 when something is missing or not as it was written.
    """
    from qdm_deploy.batch import verify_batch

    found = verify_batch(out, discard=discard, progress=output.progress)

    def text(console: "Console") -> None:
        for finding in found.findings[:_MOST_FINDINGS]:
            console.print(finding, style="red")
        if len(found.findings) > _MOST_FINDINGS:
            console.print(f"... and {len(found.findings) - _MOST_FINDINGS} more (--json lists all)", style="red")
        if found.discarded:
            console.print(f"{len(found.bad)} shards will be made again by the next run")
        verdict = f"{out} is {'good' if found.ok else 'NOT good'}: {found.images} images are there and intact"
        console.print(verdict, style="bold green" if found.ok else "bold red")

    output.result(
        {"ok": found.ok, "findings": found.findings, "bad": found.bad, "discarded": found.discarded,
         "images": found.images},
        text,
        found.findings,
    )  # fmt: skip
    return 0 if found.ok else CheckFailed.exit_code


class _Batch(Verb):
    """``batch BUNDLE`` generates; ``batch status`` and ``batch verify`` are commands of their own."""

    others = (status, verify)

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """The context of the command that is meant."""
        at = next((at for at, word in enumerate(args) if word not in _SWITCHES), len(args))
        for other in self.others:
            if args[at : at + 1] == [other.name]:
                return other.make_context(f"{info_name} {other.name}", [*args[:at], *args[at + 1 :]], parent, **extra)
        return super().make_context(info_name, args, parent, **extra)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The other commands, then the examples."""
        lines = (f"{ctx.command_path} {other.name} DIR    {other.short_help}" for other in self.others)
        write_lines(formatter, "Other commands", lines)
        super().format_epilog(ctx, formatter)


@click.command(
    "batch",
    cls=_Batch,
    short_help="Generate very many images, in shards; it goes on after an interruption.",
    examples=(
        "qdm-deploy batch fashion.qdm --num 50000 --out samples --workers 4",
        "qdm-deploy batch fashion.qdm --num 50000 --out fid --format npz --shard-size 50000",
        "qdm-deploy batch fashion.qdm --num 1000000 --out samples --rank 3 --world 64",
        "qdm-deploy batch status samples",
        "qdm-deploy batch verify samples",
    ),
)
@click.argument("bundle", type=click.Path(path_type=Path), help="Bundle made by `qdm-deploy build`.")
@option("--num", "count", type=int, required=True, metavar="N", help="Images of the whole job, over all workers.")
@option(
    "--out",
    required=True,
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Folder of the shards: new, or that of the same job, which then goes on.",
)
@option(
    "--format",
    default="webdataset",
    metavar="NAME",
    help="webdataset (tar), npz (arr_0 as FID tools read it) or png (a folder for each shard).",
)
@option("--shard-size", type=int, default=1000, metavar="S", help="Images of one shard, which is what can get lost.")
@option("--seed", type=int, default=0, help="Seed of the first image; the others count up from it.")
@option("--prompt", "--label", "label", metavar="TEXT", help="What to show: text, or a class.  [default: all in turn]")
@sampling_options()
@option("--workers", type=int, default=1, metavar="W", section="Where", help="Processes here; they share the cores.")
@option("--rank", type=int, metavar="R", section="Where", help="Make every shard whose number modulo WORLD is R.")
@option(
    "--world",
    type=int,
    metavar="WORLD",
    section="Where",
    help="Parts of the job.  [default: of a SLURM array, torchrun or a Kubernetes Indexed Job, else 1]",
)
@option(
    "--grace",
    type=float,
    default=20.0,
    metavar="SECONDS",
    section="Where",
    help="After SIGTERM or SIGUSR1, finish a shard that needs no longer; drop it otherwise. Exit code 75.",
)
@option(
    "--backend",
    default="auto",
    metavar="NAME",
    section="Runtime",
    help="auto, onnxruntime, openvino, tensorrt or tensorrt-rtx; auto takes openvino where it is installed.",
)
@option(
    "--precision",
    type=click.Choice(["int8", "float"]),
    default="int8",
    section="Runtime",
    help="Run the INT8 graph or the float reference.",
)
@option("--batch-size", type=int, default=16, section="Runtime", help="Images denoised together; part of the job.")
@option(
    "--threads",
    type=int,
    section="Runtime",
    help="CPU threads of a worker; part of the job.  [default: of the job under way, else a share of the cores]",
)
@click.pass_obj
def batch(output: Output, /, **options: Any) -> None:
    """Generate N images in shards, as many processes and machines as there are.

    Image i depends on the options and on i alone: any number of workers makes the same bytes. A shard is complete or
    not there; run the same command again after an interruption, or on more machines, and it makes what is missing.
    """
    from qdm_deploy.batch import BatchOptions, generate_batch

    made = generate_batch(BatchOptions(**options), output.progress)

    def text(console: "Console") -> None:
        if made.images_per_second is None:
            console.print("nothing was missing")
        else:
            speed = f"{made.images_per_second:.2f} images per second on {made.engine['backend']}"
            console.print(f"{made.images} images in {made.shards} shards, {duration(made.seconds)}, {speed}")
        _print_status(console, made.status)

    output.result(
        {"made": {"shards": made.shards, "images": made.images, "there": made.there, "seconds": made.seconds,
                  "images_per_second": made.images_per_second},
         "place": made.place, "backend": made.engine, "out": made.out, **_facts(made.status)},
        text,
        [made.out],
    )  # fmt: skip


def _facts(found: "BatchStatus") -> dict[str, object]:
    return {
        "complete": not found.missing,
        "shards": found.shards,
        "of_shards": found.job.shards,
        "images": found.images,
        "of_images": found.job.count,
        "bytes": found.bytes,
        "images_per_second": found.images_per_second,
        "fingerprint": found.job.fingerprint,
    }


def _print_status(console: "Console", found: "BatchStatus") -> None:
    job = found.job
    parts = f"{found.shards} of {job.shards} shards, {found.images} of {job.count} images, {size(found.bytes)}"
    console.print(f"{'complete' if not found.missing else 'unfinished'}: {parts}")
    if found.images_per_second is not None:
        console.print(f"one worker makes {found.images_per_second:.2f} images per second")
    if found.missing and found.running:
        left = "" if found.seconds_left is None else f", about {duration(found.seconds_left)} left"
        console.print(f"{found.running} shards are being written now{left}")
    if found.left_over:
        console.print(f"{found.left_over} temporary files are left of killed runs; the next run removes them")
    if len(found.cpus) > 1:
        console.print(f"the shards come from {len(found.cpus)} kinds of CPU: {', '.join(found.cpus)}", style="yellow")
