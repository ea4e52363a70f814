"""Milliseconds per denoising step: ours beside what a user would run instead, timed in turn in one process.

The embedded model and the DDPM CIFAR-10 architecture (35.7 M parameters, random weights), batch 4 and 16; LDM-4 (274 M)
and Stable Diffusion 1.5's U-Net (860 M) with `--models ldm4 --batches 1,4`. Ratios within
one run are the point; times move with the machine. `eps SQNR dB` is teacher-forced against the float model, on a few
unseen seeds. `of peak` is the share of the integer (or float) peak that this machine showed on one large matrix product
if nothing but the multiplications of the U-Net were to be done.

    python benchmarks/step_latency.py --save
    pip install nncf; python benchmarks/step_latency.py --models cifar10     # with NNCF's post-training INT8 too
"""

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from ablation import FIRST_SEED
from bench import Case, case, finish, parser, random_states, say, write_float, write_graph
from machine_peak import float_peak, integer_peak, multiply_accumulates
from speed_peers import PEERS, Missing

from qdm_deploy.artifacts.plan import QuantizationPlan, Target
from qdm_deploy.pipeline.quality import ReferenceRun, output_sqnr_db, reference_run
from qdm_deploy.runtime import OnnxRuntimeSession, OpenVinoSession, StepSession
from qdm_deploy.runtime.conditioning import conditioning_of
from qdm_deploy.runtime.random_inputs import random_inputs
from qdm_deploy.runtime.timing import timed_in_turn
from qdm_deploy.samplers import step_table

BASELINE = "onnxruntime FP32"
# The searches that run a large model for every layer: their result changes no time.
_LARGE = {"channel_scales": "none", "keep_fp": "none"}


@dataclass(frozen=True)
class Contender:
    """What is timed: how it is opened, and whether its products are integers."""

    opened: Callable[[], StepSession]
    integer: bool


def contenders(model: Case, folder: Path) -> dict[str, Contender]:
    """Everything that is timed for one model; the peers that are not installed raise ``Missing`` when opened."""
    float_graph = write_float(model, folder / "float")
    found = {
        BASELINE: Contender(partial(OnnxRuntimeSession, float_graph), integer=False),
        "openvino FP32": Contender(partial(OpenVinoSession, float_graph, precision="f32"), integer=False),
        "openvino BF16": Contender(partial(OpenVinoSession, float_graph, precision="bf16"), integer=False),
    }
    for name, peer in PEERS.items():
        found[name] = Contender(partial(peer.opened, model, folder / name.replace(" ", "-")), peer.integer)

    # Planned when it is first opened: a run of few contenders need not wait for the plans of others.
    @cache
    def plan(step_bins: int | str) -> QuantizationPlan:
        return model.built(step_bins=step_bins, **(_LARGE if model.name in ("ldm4", "sd15") else {}))

    @cache  # an open session may still read its file
    def ours(target: Target, step_bins: int | str) -> Path:
        return write_graph(model, plan(step_bins), target, folder / f"{target}-{step_bins}")

    for name, bins in {"": "auto", ", 4 step bins": 4}.items():
        found[f"onnxruntime INT8{name}"] = Contender(
            lambda bins=bins: OnnxRuntimeSession(ours("onnxruntime", bins)), integer=True
        )
        found[f"openvino INT8{name}"] = Contender(
            lambda bins=bins: OpenVinoSession(ours("openvino", bins)), integer=True
        )
    found["openvino INT8, throughput"] = Contender(
        lambda: OpenVinoSession(ours("openvino", "auto"), mode="throughput"), integer=True
    )
    found["openvino INT8, bf16 rest"] = Contender(
        lambda: OpenVinoSession(ours("openvino", "auto"), precision="bf16"), integer=True
    )
    return found


def main() -> None:
    arguments = parser("Time per denoising step, ours beside other runtimes and quantizers.")
    arguments.add_argument("--models", default="fashion,cifar10")
    arguments.add_argument("--batches", default="4,16")
    arguments.add_argument("--runs", type=int, default=15)
    arguments.add_argument("--seconds", type=float, default=300.0, help="what a batch size may take; fewer runs then")
    arguments.add_argument("--only", help="beginnings of names, separated by commas: time only these, and the baseline")
    given = arguments.parse_args()
    peaks = {True: integer_peak(), False: float_peak()}
    say(f"peak: {peaks[True] / 1e9:.0f} G integer and {peaks[False] / 1e9:.0f} G float multiply-accumulates a second")
    rows: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    for name in given.models.split(","):
        model = case(name, samples=16 if name == "fashion" else 2, steps=50 if name == "fashion" else 5)
        macs = multiply_accumulates(model)
        reference = _reference(model)
        with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
            found = contenders(model, Path(scratch))
            wanted = found if given.only is None else _named(found, given.only.split(","))
            opened: dict[str, StepSession] = {}
            for label, contender in wanted.items():
                try:
                    opened[label] = stack.enter_context(contender.opened())
                except Missing as why:
                    left_out[label] = str(why)
                    say(f"{label}: left out, {why}")
            quality = {label: fmean(_sqnr(reference, session, model)) for label, session in opened.items()}
            for batch in map(int, given.batches.split(",")):
                say(f"{name}, batch {batch}: timing {len(opened)} sessions in turn")
                times = timed_in_turn(
                    opened, random_inputs(model.checkpoint.spec, batch), runs=given.runs, seconds=given.seconds
                )
                base = float(np.median(times[BASELINE]))
                for label, values in times.items():
                    median = float(np.median(values))
                    done = macs * batch / (median / 1000)
                    rows.append(
                        {
                            "model": name,
                            "batch": batch,
                            "what": label,
                            "median ms": median,
                            "p95 ms": float(np.percentile(values, 95)),
                            "over ORT FP32": base / median,
                            "eps SQNR dB": min(quality[label], 199.0),
                            "of peak %": 100 * done / peaks[wanted[label].integer],
                        }
                    )
    columns = ["model", "batch", "what", "median ms", "p95 ms", "over ORT FP32", "eps SQNR dB", "of peak %"]
    extra = {"runs": given.runs, "left_out": left_out, "integer_peak": peaks[True], "float_peak": peaks[False]}
    finish("step-latency", columns, rows, extra, save=given.save)


def _named(found: dict[str, Contender], parts: list[str]) -> dict[str, Contender]:
    """The contenders whose names begin with one of the parts, and the baseline."""
    return {name: item for name, item in found.items() if name == BASELINE or name.startswith(tuple(parts))}


def _reference(model: Case) -> ReferenceRun:
    """A short float run: what every contender's outputs are compared with."""
    with tempfile.TemporaryDirectory() as scratch, OnnxRuntimeSession(write_float(model, Path(scratch))) as session:
        spec = model.checkpoint.spec
        table = step_table(model.schedule, "ddim", 5, learned_variance=spec.learned_variance)
        seeds = range(FIRST_SEED, FIRST_SEED + 4)
        conditioning = conditioning_of(spec, 4, hidden_states=random_states(spec, 4))
        return reference_run(session, table, seeds, spec, conditioning=conditioning, batch_size=4)


def _sqnr(reference: ReferenceRun, session: StepSession, model: Case) -> tuple[float, ...]:
    return tuple(output_sqnr_db(reference, session, model.checkpoint.spec, batch_size=4))


if __name__ == "__main__":
    main()
