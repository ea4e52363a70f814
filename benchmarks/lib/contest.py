"""Sessions beside each other: prepared in a folder, compared with the float model, timed in turn.

Preparing and timing may happen on two machines: a folder that `--prepare` wrote holds all that `--time` needs.
"""

import argparse
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import numpy as np
import onnx
from lib.apart import Apart, ApartSession, Stepper, timed_apart, turn_medians
from lib.case import Case, case_to_time, write_float
from lib.results import finish, parser, say
from lib.sessions import Opening

from qdm_deploy.artifacts.pipeline_spec import PipelineSpec
from qdm_deploy.backends import OnnxRuntimeSession
from qdm_deploy.building.quality import ReferenceRun, output_sqnr_db, reference_run
from qdm_deploy.components.sampling import table_for
from qdm_deploy.samplers.random_inputs import random_inputs

V = TypeVar("V")
Entrants = Callable[[Case, Path], Mapping[str, "Contender"]]

CARD = "contenders.json"
# A large tensor repeats a piece of this many bytes where a folder is to be light.
_ALIKE = 4096
_LARGE = 16 * _ALIKE


class Missing(Exception):
    """A contender that this machine cannot make; the message says what it needs."""


@dataclass(frozen=True)
class Contender:
    """A session in a contest.

    Attributes:
        prepared: writes what the session opens; raises ``Missing``.
        timed: False for a graph that runs here for its numbers only.
        rows: of its batches; None: what --batches says.
        facts: more columns, asked for after ``prepared``.
    """

    prepared: Callable[[], Opening]
    timed: bool = True
    rows: int | None = None
    facts: Callable[[], dict[str, Any]] = field(default=dict)


def contest_parser(text: str | None, *, models: str, runs: int) -> argparse.ArgumentParser:
    """The arguments of a script that holds a contest, with the defaults of two of them."""
    arguments = parser(text)
    arguments.add_argument(
        "--models", default=models, help="fashion (embedded) or, with random weights: tiny, cifar10, ldm4, sd15"
    )
    arguments.add_argument("--batches", default="4,16")
    arguments.add_argument("--runs", type=int, default=runs, help="timed steps of each contender")
    arguments.add_argument("--seconds", type=float, default=300.0, help="what a batch size may take; fewer runs then")
    arguments.add_argument("--only", help="beginnings of names, separated by semicolons: these, and the first of all")
    arguments.add_argument("--prepare", type=Path, metavar="FOLDER", help="write what is to be timed, and stop")
    arguments.add_argument(
        "--light", action="store_true", help="with --prepare: a folder that compresses to little; times stay, values go"
    )
    arguments.add_argument("--time", type=Path, metavar="FOLDER", help="time what --prepare wrote, here or elsewhere")
    return arguments


def contest(name: str, given: argparse.Namespace, entrants: Entrants) -> None:
    """Prepare and time the ``entrants`` of every model; the first of them is what the others are compared with."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = (given.time or given.prepare or Path(scratch)).absolute()
        if given.time is None:
            for model in given.models.split(","):
                shutil.rmtree(folder / model, ignore_errors=True)
                _prepare(model, folder / model, entrants, given.only, light=given.light)
        if given.prepare is not None:
            return
        cards = {path.parent: json.loads(path.read_text()) for path in sorted(folder.glob(f"*/{CARD}"))}
        rows = [row for place, card in cards.items() for row in _timed(place, card, given)]
    left_out = {place.name: card["left out"] for place, card in cards.items() if card["left out"]}
    finish(name, rows, {"runs": given.runs, "left_out": left_out}, save=given.save)


def _prepare(name: str, place: Path, entrants: Entrants, only: str | None, *, light: bool) -> None:
    """Write every wanted contender, and a card that says how each is opened and how far from float it is."""
    model = case_to_time(name)
    reference = reference_of(model)
    card: dict[str, Any] = {
        "spec": model.checkpoint.spec.model_dump(mode="json"),
        "contenders": {},
        "left out": {},
    }
    for label, contender in wanted(entrants(model, place), only).items():
        try:
            opening = contender.prepared()
        except Missing as why:
            card["left out"][label] = str(why)
            say(f"{label}: left out, {why}")
            continue
        with Apart(partial(Stepper, opening)) as one:
            sqnr = output_sqnr_db(reference, ApartSession(one, model.checkpoint.spec.interface), batch_size=4)  # type: ignore[arg-type]
        card["contenders"][label] = {
            "kind": opening.kind,
            "graph": str(opening.graph.relative_to(place)) if opening.graph.is_absolute() else str(opening.graph),
            "options": dict(opening.options),
            "timed": contender.timed,
            "rows": contender.rows,
            "facts": {"eps SQNR dB": fmean(sqnr), "last step dB": sqnr[-1], **contender.facts()},
        }
        # At once: of a large model the next one may need more memory than there is.
        (place / CARD).write_text(json.dumps(card, indent=1))
        say(f"{label}: {fmean(sqnr):.2f} dB")
    if light:
        _lighten(place)


def reference_of(model: Case) -> ReferenceRun:
    """A short float run: what every contender's outputs are compared with, teacher-forced."""
    with tempfile.TemporaryDirectory() as scratch, OnnxRuntimeSession(write_float(model, Path(scratch))) as session:
        table = table_for(model.checkpoint.denoiser, model.schedule, "ddim", 5)
        return reference_run(session, model.sampling(table), batch_size=4)


def wanted(found: Mapping[str, V], only: str | None) -> dict[str, V]:
    """All of them, or the first and those whose names begin with one of the parts of ``only``."""
    parts = ("",) if only is None else tuple(only.split(";"))
    return {name: item for number, (name, item) in enumerate(found.items()) if number == 0 or name.startswith(parts)}


def _timed(place: Path, card: Mapping[str, Any], given: argparse.Namespace) -> Iterable[dict[str, Any]]:
    """One row for each contender and batch size."""
    entries: dict[str, dict[str, Any]] = wanted(card["contenders"], given.only)
    denoiser = PipelineSpec.model_validate(card["spec"]).denoiser
    for label, entry in entries.items():
        if not entry["timed"]:
            yield {"model": place.name, "what": label, **entry["facts"]}
    entries = {label: entry for label, entry in entries.items() if entry["timed"]}
    with ExitStack() as stack:
        opened: dict[str, Apart] = {}
        for label, entry in entries.items():
            graph = place / entry["graph"] if entry["kind"] != "torch" else Path(entry["graph"])
            opening = Opening(entry["kind"], graph, entry["options"])
            opened[label] = stack.enter_context(Apart(partial(Stepper, opening)))
        sizes = [0] if all(entry["rows"] for entry in entries.values()) else list(map(int, given.batches.split(",")))
        for size in sizes if entries else ():
            batches = {label: entry["rows"] or size for label, entry in entries.items()}
            say(f"{place.name}, batch {size or 'by contender'}: timing {len(opened)} sessions in turn")
            inputs = {label: random_inputs(denoiser, batch) for label, batch in batches.items()}
            times = timed_apart(opened, inputs, runs=given.runs, seconds=given.seconds)
            base = turn_medians(next(iter(times.values()))) / next(iter(batches.values()))
            for label, values in times.items():
                row_ms = turn_medians(values) / batches[label]
                row = {
                    "model": place.name,
                    "batch": batches[label],
                    "what": label,
                    "median ms": float(np.median(values)),
                    "least ms": float(np.min(values)),
                    "p95 ms": float(np.percentile(values, 95)),
                    # Of rows, and within a turn, because a shared machine changes its speed from turn to turn.
                    "faster": float(np.median(base / row_ms)),
                    **entries[label]["facts"],
                }
                yield row


def _lighten(folder: Path) -> None:
    """Large tensors in the files beside the graphs repeat their first values."""
    for path in folder.rglob("*.onnx"):
        graph = onnx.load(path, load_external_data=False)
        for tensor in graph.graph.initializer:
            where = {entry.key: entry.value for entry in tensor.external_data}
            if where:
                _repeat(path.parent / where["location"], int(where.get("offset", 0)), int(where["length"]))
            elif len(tensor.raw_data) >= _LARGE:
                held = np.frombuffer(tensor.raw_data, np.uint8)
                tensor.raw_data = np.resize(held[:_ALIKE], len(held)).tobytes()
        path.write_bytes(graph.SerializeToString())
    for path in folder.rglob("*.xml"):
        for offset, size in re.findall(r'<data [^>]*\boffset="(\d+)"[^>]* size="(\d+)"', path.read_text()):
            _repeat(path.with_suffix(".bin"), int(offset), int(size))


def _repeat(path: Path, offset: int, length: int) -> None:
    if length >= _LARGE:
        held = np.memmap(path, np.uint8, "r+", offset, (length,))
        held[:] = np.resize(held[:_ALIKE].copy(), length)
        held.flush()
