"""``qdm-deploy engine``: TensorRT engines of bundles, and this machine's cache of them."""

import click

from qdm_deploy.cli.engine_build import build_engine
from qdm_deploy.cli.engine_cache import list_engines, prune_engines
from qdm_deploy.cli.verb import VerbGroup

__all__ = ["engine"]


@click.group(
    "engine",
    cls=VerbGroup,
    short_help="Build, list and remove TensorRT engines.",
    examples=(
        "qdm-deploy engine build fashion.qdm --sm 8.9",
        "qdm-deploy engine list",
        "qdm-deploy engine prune --max-size 2G",
    ),
)
def engine() -> None:
    """TensorRT and TensorRT-RTX engines: native code for one library version and GPU, kept outside the bundle."""


for _command in (build_engine, list_engines, prune_engines):
    engine.add_command(_command)
