"""What every script takes and leaves: a table for the reader, one JSON line for the record, rows kept on the way."""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qdm_deploy.artifacts.files import new_file
from qdm_deploy.report.machine import library_versions, machine_card

RESULTS = Path(__file__).parents[1] / "results"


def parser(text: str | None) -> argparse.ArgumentParser:
    """The arguments that every script takes; ``text``, its docstring, is what --help says."""
    arguments = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--save", metavar="MACHINE", help="write benchmarks/results/SCRIPT.MACHINE.json")
    return arguments


def finish(name: str, rows: Sequence[Mapping[str, Any]], extra: Mapping[str, Any], *, save: str | None) -> None:
    """Print the rows as a table, then all as one JSON line; ``save`` names its file."""
    print_table(rows)
    now = datetime.now(UTC)
    document = {
        "benchmark": name,
        "created": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "machine": machine_card(),
        "versions": library_versions(),
        **extra,
        "rows": list(rows),
    }
    line = json.dumps(document, sort_keys=True)
    if save is not None:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.{save}.json").write_text(line + "\n", encoding="utf-8")
    print(line)


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows under their columns, as Markdown; numbers with two decimals."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(column), *(len(line[i]) for line in cells)) for i, column in enumerate(columns)]
    for line in [columns, ["-" * width for width in widths], *cells]:
        print(f"| {' | '.join(text.rjust(width) for text, width in zip(line, widths, strict=True))} |")


def say(text: str) -> None:
    """A line for the person who waits; the result alone goes to standard output."""
    print(text, file=sys.stderr, flush=True)


class Finished:
    """Finished rows in a folder, to go on from after an interruption; without a folder nothing is kept."""

    def __init__(self, folder: Path | None, **common: Any) -> None:
        """``common``: what all rows depend on beside the code (JSON values)."""
        self.folder, self.common = folder, common

    def row(self, key: Mapping[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The row of ``key`` (JSON values): as it was kept, or made now and kept."""
        if self.folder is None:
            return make()
        identity = json.dumps({**self.common, **key, "code": _code()}, sort_keys=True)
        path = self.folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}.json"
        if path.is_file():
            kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return kept
        found = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path) as temporary:
            temporary.write_text(json.dumps(found) + "\n", encoding="utf-8")
        return found


@cache
def _code() -> str:
    """Digest of the packages that decide a number."""
    digest = hashlib.sha256()
    for package in ("qdm_calibration", "qdm_deploy.samplers", "qdm_export"):
        found = find_spec(package)
        for folder in (found and found.submodule_search_locations) or ():
            for path in sorted(Path(folder).rglob("*.py")):
                digest.update(path.read_bytes())
    return digest.hexdigest()


def _cell(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else "" if value is None else str(value)
