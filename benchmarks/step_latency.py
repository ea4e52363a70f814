"""Milliseconds per denoising step: ours beside what a user would run instead, each in its own process, in turn.

The embedded model and the DDPM CIFAR-10 architecture (35.7 M parameters, random weights), batch 4 and 16; LDM-4 (274 M)
and Stable Diffusion 1.5's U-Net (860 M) with `--models ldm4 --batches 1,4`, of which 24 GiB hold a few sessions at a
time (`--only`). Ratios within one run are the point; times move with the machine. `eps SQNR dB` is teacher-forced
against the float model, on a few unseen seeds. `of peak` is the share of the integer (or float) peak that this machine
showed on one large matrix product if nothing but the multiplications of the U-Net were to be done.

    python benchmarks/step_latency.py --save
    pip install nncf; python benchmarks/step_latency.py --models cifar10     # with NNCF's post-training INT8 too
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import numpy as np
from lib.apart import Apart, ApartSession, opened_stepper, timed_apart
from lib.bench import (
    FIRST_SEED,
    Case,
    case_to_time,
    finish,
    parser,
    random_states,
    say,
    write_exported,
    write_float,
    write_graph,
)
from lib.hinted_session import HintedSession
from lib.machine_peak import float_peak, integer_peak, multiply_accumulates
from lib.speed_peers import PEERS, Missing, Opened
from qdm_deploy.components.conditioning import conditioning_of
from qdm_deploy.runtime.random_inputs import random_inputs

from qdm_deploy.artifacts.plan import QuantizationPlan, Target
from qdm_deploy.backends import OnnxRuntimeSession, OpenVinoSession
from qdm_deploy.building.quality import ReferenceRun, output_sqnr_db, reference_run
from qdm_deploy.samplers import step_table

V = TypeVar("V")

BASELINE = "onnxruntime FP32"
COLUMNS = ("model", "batch", "what", "median ms", "p95 ms", "over ORT FP32", "eps SQNR dB", "of peak %")
# The searches that run a large model for every layer: their result changes no time.
_LARGE = {"channel_scales": "none", "keep_fp": "none"}


@dataclass(frozen=True)
class Contender:
    """What is timed: how it is made ready, and whether its products are integers."""

    prepared: Callable[[], Opened]
    integer: bool


def contenders(model: Case, folder: Path) -> dict[str, Contender]:
    """Everything that is timed for one model; the peers that are not installed raise ``Missing`` when prepared."""

    @cache
    def exported() -> Path:
        return write_exported(model, folder / "exported")

    # Planned when it is first asked for: a run of few contenders need not wait for the plans of others.
    @cache
    def plan(step_bins: int | str) -> QuantizationPlan:
        return model.built(step_bins=step_bins, **(_LARGE if model.name in ("ldm4", "sd15") else {}))

    @cache
    def ours(target: Target, step_bins: int | str) -> Path:
        return write_graph(model, plan(step_bins), target, folder / f"{target}-{step_bins}")

    def int8(target: Target, bins: int | str = "auto", **options: Any) -> Contender:
        session = OnnxRuntimeSession if target == "onnxruntime" else OpenVinoSession
        return Contender(lambda: partial(session, ours(target, bins), **options), integer=True)

    float_graph = write_float(model, folder / "float")
    found = {
        BASELINE: Contender(lambda: partial(OnnxRuntimeSession, float_graph), integer=False),
        f"{BASELINE}, as exported": Contender(lambda: partial(OnnxRuntimeSession, exported()), integer=False),
        "openvino FP32": Contender(lambda: partial(OpenVinoSession, exported(), precision="f32"), integer=False),
        "openvino BF16": Contender(lambda: partial(HintedSession, exported()), integer=False),
        "openvino BF16, throughput": Contender(
            lambda: partial(HintedSession, exported(), mode="throughput"), integer=False
        ),
    }
    for name, peer in PEERS.items():
        own = folder / name.replace(" ", "-").replace(",", "")
        found[name] = Contender(partial(peer.prepared, model, own), peer.integer)
    for target in ("onnxruntime", "openvino"):
        found[f"{target} INT8"] = int8(target)
        found[f"{target} INT8, 4 step bins"] = int8(target, 4)
        found[f"{target} INT8, throughput"] = int8(target, mode="throughput")
    found["openvino INT8, bf16 rest"] = int8("openvino", precision="bf16")
    return found


def main() -> None:
    arguments = parser("Time per denoising step, ours beside other runtimes and quantizers.")
    arguments.add_argument("--models", default="fashion,cifar10")
    arguments.add_argument("--batches", default="4,16")
    arguments.add_argument("--runs", type=int, default=15)
    arguments.add_argument("--seconds", type=float, default=300.0, help="what a batch size may take; fewer runs then")
    arguments.add_argument(
        "--only", help="beginnings of names, separated by semicolons: time only these, and the baseline"
    )
    given = arguments.parse_args()
    peaks = {True: integer_peak(), False: float_peak()}
    say(f"peak: {peaks[True] / 1e9:.0f} G integer and {peaks[False] / 1e9:.0f} G float multiply-accumulates a second")
    rows: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    for name in given.models.split(","):
        model = case_to_time(name)
        macs = multiply_accumulates(model)
        reference = reference_of(model)
        with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
            found = contenders(model, Path(scratch))
            chosen = wanted(found, given.only)
            opened: dict[str, Apart] = {}
            for label, contender in chosen.items():
                try:
                    session = contender.prepared()
                except Missing as why:
                    left_out[label] = str(why)
                    say(f"{label}: left out, {why}")
                else:
                    opened[label] = stack.enter_context(Apart(partial(opened_stepper, session)))
            quality = {label: fmean(sqnr_of(reference, ApartSession(one), model)) for label, one in opened.items()}
            for batch in map(int, given.batches.split(",")):
                say(f"{name}, batch {batch}: timing {len(opened)} sessions in turn")
                inputs = random_inputs(model.checkpoint.spec, batch)
                times = timed_apart(opened, inputs, runs=given.runs, seconds=given.seconds)
                integer = {label: item.integer for label, item in chosen.items()}
                rows += timed_rows(name, batch, times, macs, quality, integer, peaks)
    extra = {"runs": given.runs, "left_out": left_out, "integer_peak": peaks[True], "float_peak": peaks[False]}
    finish("step-latency", COLUMNS, rows, extra, save=given.save)


def timed_rows(
    model: str,
    batch: int,
    times: Mapping[str, Sequence[float]],
    macs: int,
    quality: Mapping[str, float],
    integer: Mapping[str, bool],
    peaks: Mapping[bool, float],
) -> list[dict[str, Any]]:
    """One row for each contender of ``times`` (milliseconds); ``macs`` are of one row of the batch."""
    base = float(np.median(times[BASELINE]))
    rows = []
    for label, values in times.items():
        median = float(np.median(values))
        rows.append(
            {
                "model": model,
                "batch": batch,
                "what": label,
                "median ms": median,
                "p95 ms": float(np.percentile(values, 95)),
                "over ORT FP32": base / median,
                "eps SQNR dB": min(quality[label], 199.0),
                "of peak %": 100 * macs * batch / (median / 1000) / peaks[integer[label]],
            }
        )
    return rows


def wanted(found: Mapping[str, V], only: str | None) -> dict[str, V]:
    """All of them, or those whose names begin with one of the parts of ``only``, and the baseline."""
    parts = ("",) if only is None else tuple(only.split(";"))
    return {name: item for name, item in found.items() if name == BASELINE or name.startswith(parts)}


def reference_of(model: Case) -> ReferenceRun:
    """A short float run: what every contender's outputs are compared with."""
    with tempfile.TemporaryDirectory() as scratch, OnnxRuntimeSession(write_float(model, Path(scratch))) as session:
        spec = model.checkpoint.spec
        table = step_table(model.schedule, "ddim", 5, learned_variance=spec.learned_variance)
        seeds = range(FIRST_SEED, FIRST_SEED + 4)
        conditioning = conditioning_of(spec, 4, hidden_states=random_states(spec, 4))
        return reference_run(session, table, seeds, spec, conditioning=conditioning, batch_size=4)


def sqnr_of(reference: ReferenceRun, session: ApartSession, model: Case) -> tuple[float, ...]:
    return tuple(output_sqnr_db(reference, session, model.checkpoint.spec, batch_size=4))  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
