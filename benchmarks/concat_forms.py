"""The three forms of scales at skip concatenations beside each other, on the embedded model in W8A8.

none: one scale for all branches; branch: factors k, folded into one kernel; split: one kernel per branch and an add.
On every target: teacher-forced SQNR of the network's output and PSNR of the finished images. Milliseconds per step on
the CPU targets, every graph in a process of its own, in turn; kernels of the TensorRT-RTX engine, where that module is
installed.

    python benchmarks/concat_forms.py --save
"""

import dataclasses
import tempfile
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
from ablation import session_for
from lib.apart import Apart, opened_stepper, timed_apart
from lib.bench import CPU_SESSIONS, FIRST_SEED, Case, case, finish, parser, say, write_float, write_graph
from qdm_deploy.components.conditioning import conditioning_of
from qdm_deploy.runtime.random_inputs import random_inputs

from qdm_calibration.plan import PlanOptions
from qdm_calibration.statistics import collect_statistics
from qdm_deploy.artifacts.plan import TARGETS, QuantizationPlan
from qdm_deploy.backends import OnnxRuntimeSession
from qdm_deploy.building.engine_audit import audit_row
from qdm_deploy.building.quality import ReferenceRun, compare_with, reference_run
from qdm_deploy.samplers import step_table
from qdm_export.split_concat import split_checkpoint
from qdm_export.topology import topology_of

FORMS: tuple[Literal["none", "branch", "split"], ...] = ("none", "branch", "split")


def split_case(model: Case) -> Case:
    """The same model with its readers of skip concatenations split, measured on the same calibration set."""
    checkpoint, graph = split_checkpoint(model.checkpoint, model.graph)
    topology = topology_of(graph)
    statistics = collect_statistics(checkpoint.unet, topology, model.calibration, checkpoint.spec.num_train_timesteps)
    return dataclasses.replace(model, checkpoint=checkpoint, graph=graph, topology=topology, statistics=statistics)


def measured(
    model: Case, form: str, plan: QuantizationPlan, reference: ReferenceRun, scratch: Path, sm: str
) -> list[dict[str, Any]]:
    """One row for each target, without times."""
    rows = []
    for target in TARGETS:
        backend, opened = session_for(model, plan, target, scratch / f"{form}-{target}")
        with opened as session:
            quality, _ = compare_with(reference, session, model.checkpoint.spec, target=target, backend=backend)
        row: dict[str, Any] = {
            "form": form,
            "target": target,
            "int8 layers": len(plan.quantized),
            "eps SQNR dB": quality.eps_sqnr_mean_db,
            "last step": quality.eps_sqnr_db[-1],
            "PSNR dB": quality.psnr_mean_db,
        }
        if target == "tensorrt" and find_spec("tensorrt_rtx") is not None:
            graph = write_graph(model, plan, target, scratch / f"{form}-engine")
            engine, _ = audit_row(graph, plan, backend="tensorrt-rtx", sm=sm)
            row |= {"int8 in engine": engine.int8, "kernels": engine.kernels["kernels"]}
        rows.append(row)
    return rows


def main() -> None:
    arguments = parser("None, branch and split scales at skip concatenations, on the embedded model.")
    arguments.add_argument("--seeds", type=int, default=64)
    arguments.add_argument("--steps", type=int, default=20)
    arguments.add_argument("--calibration-samples", type=int, default=16)
    arguments.add_argument("--runs", type=int, default=40)
    arguments.add_argument("--batches", default="4,16")
    arguments.add_argument("--sm", default="8.9")
    given = arguments.parse_args()
    model = case("fashion", samples=given.calibration_samples)
    spec, seeds = model.checkpoint.spec, range(FIRST_SEED, FIRST_SEED + given.seeds)
    models = dict.fromkeys(FORMS, model) | {"split": split_case(model)}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        scratch = Path(folder)
        with OnnxRuntimeSession(write_float(model, scratch / "float")) as session:
            say("float reference")
            table = step_table(model.schedule, "ddim", given.steps)
            reference = reference_run(session, table, seeds, spec, conditioning=conditioning_of(spec, given.seeds))
        opened: dict[tuple[str, str], Apart] = {}
        for form in FORMS:
            say(form)
            plan = models[form].plan(PlanOptions(concat_scales=form))
            rows += measured(models[form], form, plan, reference, scratch, given.sm)
            for target, session_class in CPU_SESSIONS.items():
                graph = write_graph(models[form], plan, target, scratch / f"{form}-{target}-timed")
                made = partial(session_class, graph, mode="throughput")
                opened[form, target] = stack.enter_context(Apart(partial(opened_stepper, made)))
        for batch in map(int, given.batches.split(",")):
            say(f"batch {batch}: timing {len(opened)} graphs in turn")
            times = timed_apart(opened, random_inputs(spec, batch), runs=given.runs, seconds=120)
            for row in rows:
                if (row["form"], row["target"]) in times:
                    row[f"ms at {batch}"] = float(np.median(times[row["form"], row["target"]]))
    columns = list(dict.fromkeys(key for row in rows for key in row))
    extra = {key: value for key, value in vars(given).items() if key != "save"}
    finish("concat-forms", columns, rows, extra, save=given.save)


if __name__ == "__main__":
    main()
