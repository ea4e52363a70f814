"""The tables of the PTQ papers, reproduced on the embedded model.

(a) calibration source, (b) its timesteps, (c) range metric, (d) operation selection, (e) unit of weight reconstruction,
(f) scales at skip concatenations, (g) step-aware gains, (h) other quantizers. Every row is measured under several
calibration seeds; median and spread are shown. Finished rows are kept in the cache, so a run that was interrupted goes
on. Nothing is timed.

    python benchmarks/paper_tables.py --images DIR --cache DIR --save
    python benchmarks/paper_tables.py --document benchmarks/results/DATE-paper-tables.json
"""

import argparse
import inspect
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lab import document as page
from lab.laboratory import Laboratory, Model, Settings
from lab.papers import COMMENTS, FINDINGS
from lab.row import Row, RowCache, Skipped, code_version
from lab.tables import LETTERS, rows_of
from lib.bench import parser, print_table, publish, say
from lib.peer_models import CALIBRATION_STEPS

import qdm_calibration.plan
import qdm_deploy.samplers
import qdm_export.unet
from qdm_deploy.building.bundle_from_checkpoint import EMBEDDED_MODEL
from qdm_deploy.errors import InputError
from qdm_export.unet import load_checkpoint

HERE = Path(__file__).parent
DOCUMENT = HERE.parent / "docs" / "paper-tables.md"
# What does not change a number: the text of the document, and this file.
_TEXT = ("papers.py", "document.py")


def measuring_sources() -> list[Path]:
    """The modules whose change makes finished rows worthless."""
    folders = [Path(inspect.getfile(module)).parent for module in (qdm_calibration.plan, qdm_deploy.samplers)]
    export = Path(inspect.getfile(qdm_export.unet)).parent
    return [
        *(path for folder in folders for path in folder.glob("*.py")),
        *(export / name for name in ("unet.py", "split_concat.py", "topology.py", "step_graph.py")),
        *(path for path in (HERE / "lab").glob("*.py") if path.name not in _TEXT),
        HERE / "lib" / "peer_models.py",
        HERE / "concat_forms.py",
        HERE / "lib" / "made_pictures.py",
    ]


def main() -> None:
    given = _arguments()
    if given.document is not None:
        results = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in given.document}
        DOCUMENT.write_text(page.document(page.merged(list(results.values())), COMMENTS, tuple(results)), "utf-8")
        say(f"wrote {DOCUMENT}")
        return
    with tempfile.TemporaryDirectory() as scratch:
        settings = Settings(
            seeds=given.seeds, steps=given.steps, samples=given.calibration_samples, images=given.images,
            cache=given.cache, iterations=given.reconstruct_iterations, scratch=Path(scratch),
            frechet_images=given.frechet_images, frechet_steps=given.frechet_steps, device=given.device,
        )  # fmt: skip
        rows, skipped, weights = _measure(given, settings)
    for letter in given.only:
        found = page.spreads(rows, letter)
        print(f"\n({letter}) {FINDINGS[letter].title}")
        columns = list(dict.fromkeys(name for cells in found.values() for name in cells))
        print_table(
            ["row", *columns], [{"row": row, **{n: str(v) for n, v in cells.items()}} for row, cells in found.items()]
        )
        print(page.verdict(FINDINGS[letter], found))
    extra = {
        "weights": weights,
        "seeds": given.seeds,
        "steps": given.steps,
        "sampler": "ddim",
        "calibration_samples": given.calibration_samples,
        "calibration_steps": CALIBRATION_STEPS,
        "calibration_seeds": given.calibration_seeds,
        "reconstruct_seeds": given.reconstruct_seeds,
        "frechet_images": settings.frechet_images,
        "frechet_steps": settings.frechet_steps,
        "skipped": skipped,
    }
    print()
    publish("paper-tables", rows, extra, save=given.save)


def _measure(given: argparse.Namespace, settings: Settings) -> tuple[list[dict[str, Any]], dict[str, str], str]:
    """The rows of all calibration seeds in the order of the tables; what was left out and why; the weights' digest."""
    model = Model(load_checkpoint(EMBEDDED_MODEL), settings)
    common = {
        "weights": model.weights,
        "code": code_version(measuring_sources()),
        "seeds": given.seeds,
        "steps": given.steps,
        "calibration_samples": given.calibration_samples,
    }
    cache = RowCache(given.cache, common)
    table = [row for letter in given.only for row in rows_of(letter, settings)]
    # One calibration seed after the other: its statistics are large, and shared by most rows.
    todo = [
        (seed, row)
        for seed in sorted({*given.calibration_seeds, *given.reconstruct_seeds})
        for row in table
        if seed in (given.reconstruct_seeds if row.letter == "e" else given.calibration_seeds)
    ]
    found = {(seed, row.name, row.letter): cache.read(row, seed) for seed, row in todo}
    missing = [(seed, row) for seed, row in todo if found[seed, row.name, row.letter] is None]
    clock = _TimeLeft(missing)
    skipped: dict[str, str] = {}
    lab: Laboratory | None = None
    for seed, row in missing:
        if lab is None or lab.seed != seed:
            lab = Laboratory(model, seed)
        try:
            numbers = row.measure(lab)
        except Skipped as why:
            skipped[f"({row.letter}) {row.name}"] = str(why)
            say(f"({row.letter}) {row.name}: left out, {why}")
        else:
            cache.write(row, seed, numbers)
            found[seed, row.name, row.letter] = numbers
            shown = ", ".join(f"{name} {value:.2f}" for name, value in numbers.items())
            say(f"({row.letter}) {row.name}, calibration seed {seed}: {shown}")
        clock.done(row)
    rows = [
        {"letter": row.letter, "row": row.name, "calibration_seed": seed, **measured}
        for row in table
        for seed in given.calibration_seeds + [s for s in given.reconstruct_seeds if s not in given.calibration_seeds]
        if (measured := found.get((seed, row.name, row.letter))) is not None
    ]
    return rows, skipped, model.weights


class _TimeLeft:
    """Says how much is left, by the network evaluations that each row takes."""

    def __init__(self, missing: Sequence[tuple[int, Row]]) -> None:
        """Start the clock."""
        self.left = sum(row.cost for _, row in missing)
        self.rows, self.spent = len(missing), 0
        self.start: float | None = None
        say(f"{self.rows} rows to measure, some {self.left} network evaluations")

    def done(self, row: Row) -> None:
        """A row is finished."""
        self.left, self.rows = self.left - row.cost, self.rows - 1
        if self.start is None:  # the first row also paid for what all rows share, and says nothing of the others
            self.start = time.perf_counter()
            say(f"    {self.rows} rows left")
            return
        self.spent += row.cost
        minutes = (time.perf_counter() - self.start) / self.spent * self.left / 60
        say(f"    {self.rows} rows left, about {minutes:.0f} minutes")


def _arguments() -> argparse.Namespace:
    arguments = parser("The tables of the PTQ papers on the embedded model.")
    arguments.add_argument("--images", type=Path, help="folder with the IDX files of Fashion-MNIST, for (a)")
    arguments.add_argument("--cache", type=Path, help="folder of finished rows, to go on from after an interruption")
    arguments.add_argument("--only", default=",".join(LETTERS), help="letters of the tables, separated by commas")
    arguments.add_argument("--seeds", type=int, default=64)
    arguments.add_argument("--steps", type=int, default=20)
    arguments.add_argument("--calibration-samples", type=int, default=16)
    arguments.add_argument("--calibration-seeds", default="0,1,2")
    arguments.add_argument("--reconstruct-seeds", default="0", help="calibration seeds of (e), which is slow")
    arguments.add_argument("--reconstruct-iterations", type=int, default=300, help="of (e), for each block or layer")
    arguments.add_argument("--frechet-images", type=int, default=1000, help="of (e) and (f) in W4A8")
    arguments.add_argument("--frechet-steps", type=int, default=10)
    arguments.add_argument("--device", default="cpu", help="where simulations run: cpu or cuda")
    arguments.add_argument(
        "--document",
        type=Path,
        nargs="+",
        help="only write docs/paper-tables.md from this result; letters of further ones replace its own",
    )
    given = arguments.parse_args()
    given.only = given.only.split(",")
    for letter in given.only:
        if letter not in LETTERS:
            raise InputError(f"--only: there is no table {letter!r}; choose from {', '.join(LETTERS)}")
    given.calibration_seeds = _numbers("--calibration-seeds", given.calibration_seeds)
    given.reconstruct_seeds = _numbers("--reconstruct-seeds", given.reconstruct_seeds)
    for name in ("seeds", "steps", "calibration_samples", "reconstruct_iterations", "frechet_images", "frechet_steps"):
        if getattr(given, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(given, name)}; give at least 1")
    return given


def _numbers(option: str, text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"{option} is {text!r}; give whole numbers separated by commas, such as 0,1,2") from error
    if min(numbers) < 0 or len(set(numbers)) != len(numbers):
        raise InputError(f"{option} is {text!r}; give different numbers from 0 on")
    return numbers


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
