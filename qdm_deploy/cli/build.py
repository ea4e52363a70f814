"""``qdm-deploy build``: from a checkpoint to a verified INT8 bundle."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qdm_deploy.cli.output import Output
from qdm_deploy.cli.progress import duration
from qdm_deploy.cli.sampling import DEFAULTS, SAMPLER_NAMES
from qdm_deploy.cli.tables import db, print_engines, print_table, size
from qdm_deploy.cli.verb import CommaList, CountOrAuto, Verb, option
from qdm_deploy.errors import CheckFailed, InputError

if TYPE_CHECKING:
    from rich.console import Console

    from qdm_deploy.report.model import QualityRow, Report

__all__ = ["build"]

_BUILT_IN_MODEL = "ddpm-fashion-mnist"
_CALIBRATION, _QUANTIZATION, _TARGETS, _VERIFICATION = (
    "Calibration",
    "Quantization",
    "Targets",
    "Verification and verdict",
)
_FILE = click.Path(path_type=Path)


@click.command(
    "build",
    cls=Verb,
    short_help="Turn a checkpoint into a verified INT8 bundle.",
    examples=(
        "qdm-deploy build --int8",
        "qdm-deploy build --int8 ./my-model --out my-model.qdm --sampler dpmpp-2m --steps 20",
        "qdm-deploy build --int8 google/ddpm-cifar10-32 --targets onnxruntime,openvino --no-engines",
        "qdm-deploy build --int8 ./my-model --min-psnr 35 && ./publish.sh my-model.qdm",
    ),
)
@click.argument(
    "model", required=False, help="Folder or Hugging Face name of a diffusers model; without: a small built-in one."
)
@option("--int8", is_flag=True, help="Precision of the bundle; required, and the only one today.")
@option("--out", type=_FILE, help="Where the bundle goes.  [default: ./<model name>.qdm]")
@option("--force", is_flag=True, help="Replace the output if it is a bundle.")
@option("--sampler", metavar="NAME", help=f"Sampler the bundle is tuned for: {SAMPLER_NAMES}  {DEFAULTS['sampler']}")
@option("--steps", type=int, help=f"Its denoising steps.  {DEFAULTS['steps']}")
@option("--guidance", type=float, help=f"Scale of classifier-free guidance; 1 is none.  {DEFAULTS['guidance']}")
@option(
    "--prompts",
    "prompts_file",
    type=click.Path(path_type=Path),
    help="Text file, a prompt (and a tab and a negative one) a line: half calibrate, half judge.  [default: ours]",
)
@option("--seed", type=int, default=0, help="Seed of everything random in the build.")
@option("--threads", type=int, help="CPU threads.  [default: all cores]")
@option(
    "--calib-samples",
    "calibration_samples",
    type=int,
    default=16,
    section=_CALIBRATION,
    help="Trajectories to measure.",
)
@option("--calib-steps", "calibration_steps", type=int, default=20, section=_CALIBRATION, help="Steps of each of them.")
@option(
    "--strategy",
    type=click.Choice(["uniform", "ndtc"]),
    default="uniform",
    section=_CALIBRATION,
    help="Timesteps to measure: evenly spread, or normally distributed as in PTQ4DM.",
)
@option(
    "--ndtc-mean", type=float, default=0.4, section=_CALIBRATION, help="Mean of ndtc, as a fraction of all timesteps."
)
@option("--ndtc-spread", type=float, default=0.4, section=_CALIBRATION, help="Spread of ndtc, likewise.")
@option("--ndtc-count", type=int, default=320, section=_CALIBRATION, help="Samples that ndtc draws.")
@option(
    "--calibration",
    "calibration_file",
    type=_FILE,
    section=_CALIBRATION,
    help="Take this saved calibration set rather than making one.",
)
@option("--save-calibration", type=_FILE, section=_CALIBRATION, help="Keep the calibration set in this file.")
@option(
    "--conditioning",
    "conditioning_file",
    type=_FILE,
    section=_CALIBRATION,
    help="Safetensors file with encoder_hidden_states (and unconditional_hidden_states) for a text-conditional model.",
)
@option(
    "--ranges",
    type=click.Choice(["minmax", "percentile", "mse", "lp"]),
    default="lp",
    section=_QUANTIZATION,
    help="How the scale of an input follows from its histogram; lp (p = 2.4) and mse search, mse clips more.",
)
@option(
    "--no-upsample-phases",
    "upsample_phases",
    is_flag=True,
    flag_value=False,
    default=True,
    show_default=False,
    section=_QUANTIZATION,
    help="Leave convolutions behind an upsampling whole: a bit more precise, and slower on CPUs than in four parts.",
)
@option(
    "--no-zero-offset",
    "zero_offset",
    is_flag=True,
    flag_value=False,
    default=True,
    show_default=False,
    section=_QUANTIZATION,
    help="Keep every grid symmetric around zero.",
)
@option(
    "--concat-scales",
    type=click.Choice(["none", "branch", "split"]),
    default="branch",
    section=_QUANTIZATION,
    help="Scales at skip concatenations: one for all, one for each branch, or a kernel for each branch.",
)
@option(
    "--channel-scales",
    type=click.Choice(["none", "free", "auto"]),
    default="free",
    section=_QUANTIZATION,
    help="Scales per input channel: none, or kept where the layer then errs less; free: only where they cost no "
    "operation.",
)
@option(
    "--step-bins",
    type=CountOrAuto(),
    metavar="auto|N",
    default="auto",
    section=_QUANTIZATION,
    help="Timestep bins with a gain of their own, cut where it helps most; 1 is none, auto as many as pay for "
    "themselves.",
)
@option(
    "--from-modelopt",
    metavar="CONFIG|FILE",
    section=_QUANTIZATION,
    help="Scales of NVIDIA ModelOpt rather than our own: INT8_DEFAULT_CFG, INT8_SMOOTHQUANT_CFG, INT8_DIFFUSERS, or a "
    "safetensors file with its quantizers' state. Goes with none of the options above.",
)
@option(
    "--keep-fp",
    section=_QUANTIZATION,
    metavar="auto|N%|N%time|none|NAMES",
    help="Layers to keep in float: few, cheap and noisy ones and what --min-sqnr takes; the noisiest within N percent "
    "of the INT8 multiply-accumulates, or so that a step takes N percent longer at most, measured on OpenVINO; none; "
    "or names and patterns (a,b*).  [default: auto; with --from-modelopt none]",
)
@option(
    "--no-sensitivity",
    "sensitivity",
    is_flag=True,
    flag_value=False,
    default=True,
    show_default=False,
    section=_QUANTIZATION,
    help="Do not measure each layer's noise, unless --keep-fp needs it; the report then has no frontier.",
)
@option(
    "--weight-bits",
    type=click.Choice(["8", "4"]),
    default="8",
    section=_QUANTIZATION,
    callback=lambda ctx, parameter, value: int(value),
    help="Bits of a weight; 4 need --reconstruct weights to stay close to the model.",
)
@option(
    "--reconstruct",
    type=click.Choice(["none", "weights", "full"]),
    default="none",
    section=_QUANTIZATION,
    help="Learn how weights are rounded (AdaRound), block by block; full: activation scales (LSQ) too. Takes minutes.",
)
@option(
    "--reconstruct-iterations",
    type=int,
    default=300,
    section=_QUANTIZATION,
    help="Training steps of each block.",
)
@option(
    "--output-correction",
    type=click.Choice(["none", "auto"]),
    show_default="auto; with --from-modelopt none",
    section=_QUANTIZATION,
    help="Take away what of the model's error follows its output and its input at each timestep, where that helps on "
    "other samples.",
)
@option(
    "--targets",
    type=CommaList(),
    default="onnxruntime,openvino,tensorrt",
    section=_TARGETS,
    metavar="A,B",
    help="Runtimes that get a graph.",
)
@option(
    "--rest",
    type=click.Choice(["fp16", "bf16"]),
    default="fp16",
    section=_TARGETS,
    help="Floating-point type around the INT8 kernels on tensorrt; bf16 is less precise, and for models that fp16 "
    "overflows.",
)
@option(
    "--engines",
    type=CommaList(),
    section=_TARGETS,
    metavar="X.Y,...",
    help="Compute capabilities to build and audit an engine for.  [default: 8.9 where tensorrt-rtx is installed]",
)
@option("--no-engines", is_flag=True, section=_TARGETS, help="Build and audit no engine.")
@option(
    "--no-float",
    "float_graph",
    is_flag=True,
    flag_value=False,
    default=True,
    show_default=False,
    section=_TARGETS,
    help="Leave the float reference graph out of the bundle.",
)
@option("--verify-samples", type=int, default=16, section=_VERIFICATION, help="Samples for the comparison with float.")
@option("--verify-steps", type=int, default=20, section=_VERIFICATION, help="Steps of each of them.")
@option(
    "--min-psnr",
    "min_psnr_db",
    type=float,
    section=_VERIFICATION,
    help="Mean PSNR of the images to ship, in dB.  [default: 30; of latent models none]",
)
@option(
    "--min-sqnr",
    "min_eps_sqnr_db",
    type=float,
    default=25.0,
    section=_VERIFICATION,
    help="Mean SQNR of the model's output to ship, in dB.",
)
@option(
    "--min-speedup", type=float, default=1.0, section=_VERIFICATION, help="Speed over float to ship; 0 asks for none."
)
@click.pass_context
def build(ctx: click.Context, /, int8: bool, no_engines: bool, **options: Any) -> int:
    """Calibrate, quantize and export MODEL, compare the result with the float model, and write it as one folder.

    It ends with a verdict: the exit code is 0 for SHIP and 1 for DO NOT SHIP. The bundle is written in both cases, with
    its report in report.html.
    """
    output: Output = ctx.obj
    if not int8:
        raise InputError("no precision was given; today there is one, INT8: add --int8")
    if no_engines:
        if options["engines"] is not None:
            raise InputError("--no-engines and --engines contradict each other; give one of them")
        options["engines"] = ()
    from qdm_deploy.pipeline import BuildOptions
    from qdm_deploy.pipeline import build as run

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
