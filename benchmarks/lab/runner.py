"""Tables of rows that are measured under several calibration seeds: medians, spreads, and what was finished before."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from statistics import median
from typing import Any

from lab.laboratory import Laboratory, Model, Settings, Skipped
from lib.results import Finished, finish, parser, print_table, say

from qdm_deploy.building.bundle_from_checkpoint import EMBEDDED_MODEL
from qdm_export.unet import load_checkpoint

Rows = Mapping[str, Callable[[Laboratory], dict[str, float]]]
_NOT_NUMBERS = ("table", "row", "calibration_seed")


def run(name: str, text: str | None, tables: Mapping[str, Rows], *, slow: Sequence[str] = ()) -> None:
    """Measure what the command line asks for: ``tables`` of rows by name, on the embedded model.

    ``slow`` tables are measured under the first calibration seed alone.
    """
    arguments = parser(text)
    for option in fields(Settings):
        arguments.add_argument(f"--{option.name.replace('_', '-')}", default=option.default, **option.metadata)
    arguments.add_argument("--only", nargs="+", default=list(tables), choices=tables, help="tables to measure")
    arguments.add_argument("--rows", default="", help="beginnings of their rows, separated by semicolons")
    arguments.add_argument("--calibration-seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument("--cache", type=Path, help="folder of finished rows, to go on from after an interruption")
    given = arguments.parse_args()
    settings = Settings(**{option.name: getattr(given, option.name) for option in fields(Settings)})
    model = Model(load_checkpoint(EMBEDDED_MODEL), settings)
    rows, skipped = _measured(given, model, tables, slow)
    for table in given.only:
        print(f"\n({table})\n")
        print_table(spreads([row for row in rows if row["table"] == table]))
    kept = {key: value for key, value in vars(given).items() if key not in ("images", "cache", "save")}
    print()
    finish(name, rows, {"weights": model.checkpoint.weights_sha256, "skipped": skipped, **kept}, save=given.save)


def spreads(rows: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """One line for each row of a table: its numbers' medians over the calibration seeds, and their spread."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        for column in (key for key in row if key not in _NOT_NUMBERS):
            found.setdefault(row["row"], {}).setdefault(column, []).append(row[column])
    return [
        {"row": name, **{column: _spread(values) for column, values in columns.items()}}
        for name, columns in found.items()
    ]


def _spread(values: Sequence[float]) -> str:
    return f"{median(values):.2f}" + (f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else "")


def _measured(
    given: argparse.Namespace, model: Model, tables: Mapping[str, Rows], slow: Sequence[str]
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The rows of all calibration seeds, table by table; what was left out and why."""
    kept = Finished(given.cache, weights=model.checkpoint.weights_sha256, settings=model.settings.deciding())
    found: list[dict[str, Any]] = []
    skipped: dict[str, str] = {}
    # One calibration seed after the other: its statistics are large, and shared by most rows.
    for number, seed in enumerate(given.calibration_seeds):
        lab = Laboratory(model, seed)
        for table in given.only:
            for row, measure in tables[table].items():
                if (number and table in slow) or not row.startswith(tuple(given.rows.split(";"))):
                    continue
                key = {"table": table, "row": row, "calibration_seed": seed}
                try:
                    numbers = kept.row(key, lambda: measure(lab))  # noqa: B023  # called at once
                except Skipped as why:
                    skipped[f"{table}: {row}"] = str(why)
                    say(f"{table}: {row}: left out, {why}")
                    continue
                shown = ", ".join(f"{name} {value:.2f}" for name, value in numbers.items())
                say(f"{table}: {row}, calibration seed {seed}: {shown}")
                found.append({**key, **numbers})
    return found, skipped
