"""`step_latency.py` in two halves, for a machine that cannot make the graphs: make them here, time them there.

    python benchmarks/carried_latency.py prepare FOLDER --models cifar10 --light
    python benchmarks/carried_latency.py time FOLDER --save

Also for a model that is too large to be held beside the sessions that are timed:

    python benchmarks/carried_latency.py prepare FOLDER --models sd15 --only "openvino BF16;openvino INT8, throughput"
    python benchmarks/carried_latency.py time FOLDER --batches 1 --runs 5

The folder must have the same path on both machines. With `--light` the graphs' large tensors repeat a short piece of
themselves, so that the folder compresses to little: times do not depend on the values, and `eps SQNR dB` is measured
before. The peers that run in PyTorch are left out, since they are no graphs.
"""

import argparse
import json
import re
import shutil
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import onnx
from lib.apart import Apart, ApartSession, opened_apart, opened_stepper, timed_apart
from lib.bench import CPU_SESSIONS, Case, case_to_time, finish, parser, save_form, say
from lib.hinted_session import HintedSession
from lib.machine_peak import float_peak, integer_peak, multiply_accumulates
from lib.nncf_form import openvino_form
from lib.speed_peers import PEERS, Missing, Opened
from openvino_forms import LEFT_OUT
from step_latency import COLUMNS, Contender, contenders, reference_of, sqnr_of, timed_rows, wanted

from qdm_deploy.artifacts.model_spec import ModelSpec
from qdm_deploy.backends import OpenVinoSession
from qdm_deploy.runtime.random_inputs import random_inputs
from qdm_export.targets import TargetForm, emit

_SESSIONS = {**CPU_SESSIONS, "nncf": openvino_form, "hinted": HintedSession}
_ALIKE = 4096
_LARGE = 16 * _ALIKE


def prepare(folder: Path, models: list[str], only: str | None, *, forms: bool, light: bool) -> None:
    """Every wanted contender's graph, and contenders.json that says how each is opened."""
    for name in models:
        model, place = case_to_time(name), folder / name
        reference = reference_of(model)
        card: dict[str, Any] = {
            "spec": model.checkpoint.spec.model_dump(mode="json"),
            "multiply_accumulates": multiply_accumulates(model),
            "contenders": {},
        }
        everyone = wanted(contenders(model, place) | (_forms(model, place) if forms else {}), only)
        # Peers last, and what is done is written at once: of a large model a peer may need more memory than there is.
        for label in sorted(everyone, key=lambda label: label in PEERS):
            if label.startswith("torch") or "step bins" in label:
                continue
            try:
                opened = everyone[label].prepared()
            except Missing as why:
                say(f"{label}: left out, {why}")
                continue
            with Apart(partial(opened_stepper, opened)) as one:
                quality = fmean(sqnr_of(reference, ApartSession(one), model))
            ready = {"opened": _written(opened), "integer": everyone[label].integer, "eps SQNR dB": quality}
            card["contenders"][label] = ready
            (place / "contenders.json").write_text(json.dumps(card, indent=1))
            say(f"{label}: {quality:.2f} dB")
        if light:
            _lighten(place)


def _forms(model: Case, folder: Path) -> dict[str, Contender]:
    """The openvino target's graph with a part of its form left out, as `openvino_forms.py` times them."""
    plan = model.built()

    def opened(left_out: str, form: TargetForm) -> Opened:
        graph = save_form(emit(model.graph, plan, "openvino", form=form).model, folder / left_out, "openvino")
        return partial(OpenVinoSession, graph, mode="throughput")

    return {
        f"openvino form without {left_out}": Contender(partial(opened, left_out, form), integer=True)
        for left_out, form in LEFT_OUT.items()
        if left_out != "nothing"
    }


def _written(opened: Opened) -> dict[str, Any]:
    """A partial of one of ``_SESSIONS`` as JSON."""
    assert isinstance(opened, partial)  # noqa: S101  # every contender but those in PyTorch is one
    kind = next(name for name, session in _SESSIONS.items() if session is opened.func)
    arguments = [str(value) for value in opened.args]
    return {"kind": kind, "arguments": arguments, "options": opened.keywords}


def _read(card: dict[str, Any]) -> Opened:
    arguments = [Path(value) if "/" in value else value for value in card["arguments"]]
    return partial(_SESSIONS[card["kind"]], *arguments, **card["options"])


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


def time_them(folder: Path, given: argparse.Namespace) -> None:
    """The table of `step_latency.py`, of the graphs in ``folder``."""
    peaks = {True: integer_peak(), False: float_peak()}
    say(f"peak: {peaks[True] / 1e9:.0f} G integer and {peaks[False] / 1e9:.0f} G float multiply-accumulates a second")
    rows: list[dict[str, Any]] = []
    for path in sorted(folder.glob("*/contenders.json")):
        card = json.loads(path.read_text())
        card["contenders"] = wanted(card["contenders"], given.only)
        spec = ModelSpec.model_validate(card["spec"])
        quality = {label: item["eps SQNR dB"] for label, item in card["contenders"].items()}
        integer = {label: item["integer"] for label, item in card["contenders"].items()}
        with ExitStack() as stack:
            makers = {
                label: partial(opened_stepper, _read(item["opened"])) for label, item in card["contenders"].items()
            }
            opened = opened_apart(makers, at_once=given.at_once)
            for one in opened.values():
                stack.enter_context(one)
            for batch in map(int, given.batches.split(",")):
                say(f"{path.parent.name}, batch {batch}: timing {len(opened)} sessions in turn")
                inputs, limits = random_inputs(spec, batch), {"runs": given.runs, "seconds": given.seconds}
                times = timed_apart(opened, inputs, **limits, at_once=given.at_once)
                found = timed_rows(
                    path.parent.name, batch, times, card["multiply_accumulates"], quality, integer, peaks
                )
                # At once: a machine of somebody else may be gone before the table is.
                for row in found:
                    say(f"{row['what']}: {row['median ms']:.2f} ms, {row['over ORT FP32']:.2f}x")
                rows += found
    extra = {"runs": given.runs, "integer_peak": peaks[True], "float_peak": peaks[False]}
    finish("carried-latency", COLUMNS, rows, extra, save=given.save)


def main() -> None:
    arguments = parser("Time per denoising step on a machine that did not make the graphs.")
    arguments.add_argument("what", choices=("prepare", "time"))
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("--models", default="cifar10")
    arguments.add_argument("--only", help="beginnings of names, separated by semicolons: only these, and the baseline")
    arguments.add_argument("--forms", action="store_true", help="and every part of the openvino form left out alone")
    arguments.add_argument("--light", action="store_true", help="make the folder compressible; the values are lost")
    arguments.add_argument("--batches", default="4,16")
    arguments.add_argument("--at-once", type=int, default=1, help="sessions that are opened and prepared at once")
    arguments.add_argument("--runs", type=int, default=15)
    arguments.add_argument("--seconds", type=float, default=300.0, help="what a batch size may take")
    given = arguments.parse_args()
    folder = given.folder.absolute()
    if given.what == "prepare":
        shutil.rmtree(folder, ignore_errors=True)
        prepare(folder, given.models.split(","), given.only, forms=given.forms, light=given.light)
    else:
        time_them(folder, given)


if __name__ == "__main__":
    main()
