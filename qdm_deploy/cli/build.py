"""``qdm-deploy build``: from a checkpoint to a verified INT8 bundle."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qdm_deploy.cli.moved_options import moved_options
from qdm_deploy.cli.output import Output
from qdm_deploy.cli.progress import duration
from qdm_deploy.cli.tables import db, print_engines, print_table, size
from qdm_deploy.cli.verb import CommaList, Verb, option
from qdm_deploy.errors import CheckFailed, InputError

if TYPE_CHECKING:
    from rich.console import Console

    from qdm_deploy.report.model import QualityRow, Report

__all__ = ["build"]

_BUILT_IN_MODEL = "ddpm-fashion-mnist"
_SAMPLING, _VERDICT = "Sampling and calibration", "Verification and verdict"
_FILE = click.Path(path_type=Path)


@click.command(
    "build",
    cls=Verb,
    short_help="Turn a checkpoint into a verified INT8 bundle.",
    examples=(
        "qdm-deploy build --int8",
        "qdm-deploy build --int8 ./my-model --out my-model.qdm --sampler dpmpp-2m --steps 20",
        "qdm-deploy build --int8 google/ddpm-cifar10-32 --recipe w4a8 --targets onnxruntime,openvino",
        "qdm-deploy build --int8 ./my-model --min-psnr 35 && ./publish.sh my-model.qdm",
    ),
)
@click.argument(
    "model", required=False, help="Folder or Hugging Face name of a diffusers model; without: a small built-in one."
)
@option("--int8", is_flag=True, help="Precision of the bundle; required, and the only one today.")
@option(
    "--recipe",
    default="default",
    metavar="NAME|FILE",
    help="How it is quantized: a name of `qdm-deploy recipe list`, or a TOML file.",
)
@option("--out", type=_FILE, help="Where the bundle goes.  [default: ./<model name>.qdm]")
@option("--force", is_flag=True, help="Replace the output if it is a bundle.")
@option(
    "--targets",
    type=CommaList(),
    default="onnxruntime,openvino,tensorrt",
    metavar="A,B",
    help="Runtimes that get a graph.",
)
@option(
    "--engines",
    type=CommaList(),
    metavar="X.Y,...|none",
    help="Compute capabilities to build and audit an engine for.  [default: 8.9 where tensorrt-rtx is installed]",
)
@option(
    "--no-float",
    "float_graph",
    is_flag=True,
    flag_value=False,
    default=True,
    show_default=False,
    help="Leave the float reference graph out of the bundle.",
)
@option("--threads", type=int, help="CPU threads.  [default: all cores]")
@option(
    "--sampler",
    default="ddim",
    metavar="NAME",
    section=_SAMPLING,
    help="Sampler the bundle is tuned for: ddpm, ddim, dpmpp-2m or euler.",
)
@option("--steps", type=int, default=50, section=_SAMPLING, help="Its denoising steps.")
@option("--guidance", type=float, default=1.0, section=_SAMPLING, help="Weight of classifier-free guidance; 1 is none.")
@option("--seed", type=int, default=0, section=_SAMPLING, help="Seed of everything random in the build.")
@option(
    "--conditioning",
    "conditioning_file",
    type=_FILE,
    section=_SAMPLING,
    help="Safetensors file with encoder_hidden_states (and unconditional_hidden_states) for a text-conditional model.",
)
@option(
    "--calibration",
    "calibration_file",
    type=_FILE,
    section=_SAMPLING,
    help="Take this saved calibration set rather than making one.",
)
@option("--save-calibration", type=_FILE, section=_SAMPLING, help="Keep the calibration set in this file.")
@option("--verify-samples", type=int, default=16, section=_VERDICT, help="Samples for the comparison with float.")
@option("--verify-steps", type=int, default=20, section=_VERDICT, help="Steps of each of them.")
@option("--min-psnr", "min_psnr_db", type=float, default=30.0, section=_VERDICT, help="Mean PSNR to ship, in dB.")
@option(
    "--min-sqnr",
    "min_eps_sqnr_db",
    type=float,
    default=25.0,
    section=_VERDICT,
    help="Mean SQNR of the model's output to ship, in dB.",
)
@option("--min-speedup", type=float, default=1.0, section=_VERDICT, help="Speed over float to ship; 0 asks for none.")
@moved_options
@click.pass_context
def build(ctx: click.Context, /, int8: bool, recipe: str, **options: Any) -> int:
    """Calibrate, quantize and export MODEL, compare the result with the float model, and write it as one folder.

    It ends with a verdict: the exit code is 0 for SHIP and 1 for DO NOT SHIP. The bundle is written in both cases, with
    its report in report.html.
    """
    output: Output = ctx.obj
    if not int8:
        raise InputError("no precision was given; today there is one, INT8: add --int8")
    if options["engines"] == ("none",):
        options["engines"] = ()
    from qdm_deploy.pipeline import BuildOptions, read_recipe
    from qdm_deploy.pipeline import build as run

    options["recipe"] = read_recipe(recipe)
    options["out"] = options["out"] or _default_out(options["model"])
    done = run(BuildOptions(**options, command=output.command_line), output.progress)
    report = done.report
    output.result(
        {"bundle": done.bundle, "bundle_id": done.bundle_id, "report": report},
        lambda console: _print_report(console, done.bundle, report),
        [done.bundle],
    )
    return 0 if report.verdict.ship else CheckFailed.exit_code


def _default_out(model: str | None) -> Path:
    """``<last part of the model's name>.qdm`` in the working directory."""
    name = _BUILT_IN_MODEL if model is None else Path(model).name or Path(model).resolve().name
    return Path(f"{name}.qdm")


def _print_report(console: "Console", bundle: Path, report: "Report") -> None:
    verdict = report.verdict
    print_table(
        console,
        "quality beside the float model",
        ("target", ">model SQNR", ">worst step", ">final sample", ">image PSNR", ">worst image"),
        (_quality_cells(row) for row in report.quality),
    )
    print_table(
        console,
        "speed of one denoising step",
        ("runtime", "precision", ">batch", ">median", ">95 %", ">samples/s"),
        (
            (
                row.backend,
                row.precision,
                str(row.batch),
                f"{row.median_ms:.2f} ms",
                f"{row.p95_ms:.2f} ms",
                f"{row.samples_per_second:.1f}",
            )
            for row in report.speed
        ),
    )
    sizes = {"float": report.size.float_bytes, **report.size.int8_bytes}
    print_table(
        console,
        "size",
        ("graph and weights", ">bytes", ">of float"),
        ((name, size(count), f"{count / report.size.float_bytes:.0%}") for name, count in sizes.items()),
    )
    print_engines(console, report.engines)
    for warning in report.warnings:
        console.print(f"\nwarning: {warning}", style="yellow")
    console.print(f"\n{verdict.headline}", style="bold green" if verdict.ship else "bold red")
    _print_lines(console, "-", verdict.problems)
    _print_lines(console, "+", verdict.merits)
    console.print(f"\nbundle: {bundle}\nreport: {bundle / 'report.html'}")
    console.print(f"built in {duration(sum(report.stage_seconds.values()))}")
    console.print(f"next:   qdm-deploy generate {bundle} -n 16 --out images", style="dim")


def _print_lines(console: "Console", mark: str, sentences: Iterable[str]) -> None:
    for sentence in sentences:
        console.print(f"  {mark} {sentence}")


def _quality_cells(row: "QualityRow") -> tuple[str, ...]:
    decibels = (row.eps_sqnr_mean_db, row.eps_sqnr_min_db, row.state_sqnr_final_db, row.psnr_mean_db, row.psnr_min_db)
    return (row.label, *map(db, decibels))
