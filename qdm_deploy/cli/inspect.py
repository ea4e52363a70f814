"""``qdm-deploy inspect``: what is in a bundle, layer by layer."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qdm_deploy.cli.output import Output
from qdm_deploy.cli.tables import db, print_table, share, size, span
from qdm_deploy.cli.verb import Verb, option

if TYPE_CHECKING:
    from rich.console import Console

    from qdm_deploy.artifacts.pipeline_spec import PipelineSpec
    from qdm_deploy.report.model import LayerRow, RewriteRow

__all__ = ["inspect"]


@click.command(
    "inspect",
    cls=Verb,
    short_help="Show a bundle's model, files and quantization plan.",
    examples=(
        "qdm-deploy inspect fashion.qdm",
        "qdm-deploy inspect fashion.qdm -v             why each layer is as it is",
        "qdm-deploy inspect fashion.qdm | grep float   the layers that stay in floating point",
    ),
)
@click.argument("bundle", type=click.Path(path_type=Path), help="Bundle made by `qdm-deploy build`.")
@option("-v", "--verbose", is_flag=True, help="Add what was decided for each layer, and why.")
@click.pass_obj
def inspect(output: Output, bundle: Path, verbose: bool) -> None:
    """Print what a bundle is and how each of its layers is quantized.

    s is the scale of a layer's input, z its zero offset in steps of s, k the factors of its concatenation branches, r
    its gains over the timestep, SQNR the signal to quantization noise of its weight, and noise its part of what all
    INT8 layers add to the model's output.
    """
    from qdm_deploy.pipeline import inspect as run
    from qdm_deploy.report.model import LayerRow

    found = run(bundle)
    layers = [LayerRow.from_plan(plan, found.noise_shares.get(plan.name)) for plan in found.plan.layers]
    summary = found.plan.summary()
    manifest = found.manifest

    def text(console: "Console") -> None:
        console.print(manifest.name, style="bold", end="")
        console.print(f"  {found.bundle_id}")
        console.print(
            f"created {manifest.created} for {', '.join(manifest.targets)}; opset {manifest.compatibility.opset}"
        )
        console.print(_model_line(found.model))
        print_table(
            console,
            "files",
            (">size", "file", "role"),
            ((size(entry.size), entry.path, entry.role) for entry in manifest.files),
        )
        for target in dict.fromkeys(row.target for row in found.rewrites):
            counts = ", ".join(row.count for row in found.rewrites if row.target == target)
            console.print(f"{target} graph: {counts}", soft_wrap=True)
        print_table(
            console,
            f"layers: {summary['int8']} of {summary['layers']} in INT8",
            ("layer", "precision", ">s", ">z", ">k", ">r", ">weight SQNR", ">noise", "reason"),
            (_cells(row) for row in layers),
        )
        if verbose:
            _print_notes(console, layers)
            _print_passed_by(console, found.rewrites)

    output.result(
        {
            "bundle_id": found.bundle_id,
            "model": found.model,
            "manifest": manifest,
            "plan_summary": summary,
            "plan_options": found.plan.options,
            "timestep_edges": found.plan.timestep_edges,
            "rewrites": found.rewrites,
            "layers": layers,
        },
        text,
        [found.bundle_id],
    )


def _model_line(model: "PipelineSpec") -> str:
    from qdm_deploy.artifacts.pipeline_spec import LabelTable, TextEncoder

    channels, height, width = model.sample_shape
    parts = [
        f"{model.name}: {channels} x {height} x {width} {model.makes}, {model.denoiser.num_train_timesteps} timesteps"
    ]
    encoder = model.encoder
    if isinstance(encoder, LabelTable):
        names = f" ({', '.join(encoder.labels)})" if encoder.labels else ""
        parts.append(f"{encoder.num_classes} classes{names}")
    elif isinstance(encoder, TextEncoder):
        parts.append("prompts")
    elif encoder is not None:
        parts.append(f"conditioned on {', '.join(encoder.inputs)}")
    return ", ".join(parts)


def _cells(row: "LayerRow") -> tuple[str, ...]:
    if row.precision == "float":
        return (row.name, row.precision, "-", "-", "-", "-", "-", share(row.noise_share), row.reason)
    gains = (span(row.branch_factors), span(row.step_gains))
    return (
        row.name,
        row.precision,
        f"{row.scale:.4g}",
        str(row.zero_offset),
        *gains,
        db(row.weight_sqnr_db),
        share(row.noise_share),
        row.reason,
    )


def _print_notes(console: "Console", layers: list["LayerRow"]) -> None:
    console.print("\ndecisions", style="bold")
    for row in layers:
        if row.notes:
            console.print(row.name)
        for factor, note in row.notes.items():
            console.print(f"  {factor}: {note}")


def _print_passed_by(console: "Console", rewrites: Iterable["RewriteRow"]) -> None:
    passed = [(row, text) for row in rewrites for text in (*row.missed, *row.left)]
    if passed:
        console.print("\npassed by in the graphs", style="bold")
    for row, text in passed:
        console.print(f"  {row.target}, {row.name}: {text}", soft_wrap=True)
