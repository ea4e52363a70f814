"""``qdm-deploy engine build``: a TensorRT engine from a bundle, and what it really computes in INT8."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qdm_deploy.cli.output import Output
from qdm_deploy.cli.tables import print_engines, print_table
from qdm_deploy.cli.verb import Verb, option

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["build_engine"]


class _Profile(click.ParamType[tuple[int, int, int]]):
    """``MIN,OPT,MAX`` as three numbers; colons are understood too."""

    name = "profile"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int, int]:
        """The three numbers; a tuple (a default) is taken as it is."""
        if isinstance(value, tuple):
            low, best, high = value
            return low, best, high
        match = re.fullmatch(r"(\d+)[,:](\d+)[,:](\d+)", str(value))
        if match is None:
            self.fail(f"{value!r} is not three batch sizes; write MIN,OPT,MAX, for example 1,4,16", param, ctx)
        return int(match[1]), int(match[2]), int(match[3])


@click.command(
    "build",
    cls=Verb,
    short_help="Build a TensorRT engine of a bundle and audit it.",
    examples=(
        "qdm-deploy engine build fashion.qdm --sm 8.9                  for an RTX 40 GPU; needs no GPU here",
        "qdm-deploy engine build fashion.qdm --backend tensorrt        for the GPU of this machine",
        "qdm-deploy engine build fashion.qdm --sm 12.0 --profile 1,8,32",
    ),
)
@click.argument("bundle", type=click.Path(path_type=Path), help="Bundle made by `qdm-deploy build`.")
@option("--backend", default="tensorrt-rtx", metavar="NAME", help="tensorrt-rtx or tensorrt.")
@option(
    "--sm", metavar="X.Y", help="Compute capability to build for.  [default: 8.9 for tensorrt-rtx, else this GPU's]"
)
@option(
    "--profile",
    type=_Profile(),
    default="1,4,16",
    metavar="MIN,OPT,MAX",
    help="Batch sizes the engine takes; it is fastest at OPT.",
)
@option(
    "--optimization-level",
    type=click.IntRange(0, 5),
    default=3,
    help="How long the builder searches: 0 is fastest to build, 5 may give the fastest engine.",
)
@option("--workspace", metavar="SIZE", help="Limit of a kernel's scratch memory, such as 2G.  [default: the library's]")
@click.pass_obj
def build_engine(output: Output, /, bundle: Path, **options: Any) -> int:
    """Build the engine, or take it from the cache of this machine, and compare its kernels with the plan.

    Engines are native code for one library version and one kind of GPU, so they stay out of the bundle. The exit code
    is 1 when a layer that was planned in INT8 is not INT8 in the engine. Sessions take what was built for their GPU
    with the default profile and options.
    """
    from qdm_deploy.pipeline import build_engine as run

    built = run(bundle, **options, progress=output.progress)

    def text(console: "Console") -> None:
        print_engines(console, [built.row])
        print_table(console, "kernels", ("kind", ">count", ">in INT8"), _kernels(built.row.kernels))
        console.print(f"\nengine: {built.path}{' (from the cache)' if built.from_cache else ''}\nlog:    {built.log}")

    output.result(
        {
            "engine": built.row,
            "clean": built.row.clean,
            "path": built.path,
            "log": built.log,
            "from_cache": built.from_cache,
        },
        text,
        [built.path],
    )
    return 0 if built.row.clean else 1


def _kernels(counts: Mapping[str, int]) -> Iterator[tuple[str, str, str]]:
    """Kinds of kernels that there are, with how many of them are INT8 where the audit tells."""
    for kind, count in counts.items():
        if count and not kind.startswith(("kernels", "planned")) and not kind.endswith("_int8"):
            yield kind.replace("_", " "), str(count), str(counts.get(f"{kind}_int8", ""))
    yield "all", str(counts["kernels"]), ""
