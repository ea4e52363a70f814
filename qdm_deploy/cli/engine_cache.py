"""``qdm-deploy engine list`` and ``engine prune``: what the engine cache of this machine holds, and less of it."""

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from qdm_deploy.cli.output import Output
from qdm_deploy.cli.tables import print_table, size
from qdm_deploy.cli.verb import Verb, option

if TYPE_CHECKING:
    from rich.console import Console

    from qdm_deploy.engines.cache import CachedEngine

__all__ = ["list_engines", "prune_engines"]


@click.command(
    "list",
    cls=Verb,
    short_help="Show the engines in this machine's cache.",
    examples=("qdm-deploy engine list", "qdm-deploy engine list --json"),
)
@click.pass_obj
def list_engines(output: Output) -> None:
    """Show the engines in this machine's cache, least recently used first: those go first when it is full.

    The folder is $QDM_CACHE_DIR/engines, by default in the user's cache folder; $QDM_ENGINE_CACHE_LIMIT is what it may
    take (20G).
    """
    from qdm_deploy.pipeline import cached_engines

    found = cached_engines()
    total = sum(engine.disk_bytes for engine in found.engines)

    def text(console: "Console") -> None:
        _print(console, "engines", found.engines)
        console.print(f"\n{size(total)} of {size(found.max_bytes)} in {found.root}")

    output.result(
        {
            "root": found.root,
            "max_bytes": found.max_bytes,
            "disk_bytes": total,
            "engines": [_document(engine) for engine in found.engines],
        },
        text,
        [engine.key for engine in found.engines],
    )


@click.command(
    "prune",
    cls=Verb,
    short_help="Remove engines that were not used for long.",
    examples=(
        "qdm-deploy engine prune                      damaged ones, and what is over the cache's limit",
        "qdm-deploy engine prune --max-size 2G",
        "qdm-deploy engine prune --all",
    ),
)
@option("--max-size", metavar="SIZE", help="What may stay, such as 2G.  [default: the cache's limit]")
@option("--all", "everything", is_flag=True, help="Remove every engine.")
@click.pass_obj
def prune_engines(output: Output, max_size: str | None, everything: bool) -> None:
    """Remove damaged engines, then those used longest ago, until the rest fits.

    An engine that is being built or opened at this moment stays. What is removed is built again when it is needed.
    """
    from qdm_deploy.pipeline import prune_engines as run

    done = run(max_size, everything=everything)
    freed = sum(engine.disk_bytes for engine in done.engines)

    def text(console: "Console") -> None:
        _print(console, "removed", done.engines)
        console.print(f"{len(done.engines)} engines removed, {size(freed)} freed in {done.root}")

    output.result(
        {"root": done.root, "freed_bytes": freed, "removed": [_document(engine) for engine in done.engines]},
        text,
        [engine.key for engine in done.engines],
    )


def _print(console: "Console", heading: str, engines: Iterable["CachedEngine"]) -> None:
    print_table(
        console,
        heading,
        ("key", "library", "target", "batch", ">size", "last used", "graph"),
        (
            (
                engine.key[:12],
                f"{meta.identity.backend} {meta.identity.library_version}" if (meta := engine.meta) else "-",
                meta.identity.target if meta else "-",
                str(meta.identity.profile) if meta else "-",
                size(engine.disk_bytes),
                datetime.fromtimestamp(engine.last_used, UTC).strftime("%Y-%m-%d %H:%M"),
                engine.problem or (meta.graph if meta else "-"),
            )
            for engine in engines
        ),
    )


def _document(engine: "CachedEngine") -> dict[str, Any]:
    return {
        "key": engine.key,
        "path": engine.path,
        "disk_bytes": engine.disk_bytes,
        "last_used": datetime.fromtimestamp(engine.last_used, UTC).isoformat(),
        "problem": engine.problem,
        "meta": engine.meta,
    }
