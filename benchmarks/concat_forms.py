"""The three forms of scales at skip concatenations beside each other, on the embedded model in W8A8.

none: one scale for all branches; branch: factors k, folded into one kernel; split: one kernel per branch and an add.
Teacher-forced SQNR of the network's output and time per step on ONNX Runtime; kernels of the TensorRT-RTX engine, where
that module is installed.

    python benchmarks/concat_forms.py --save
"""

import dataclasses
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from bench import Case, case, finish, parser, say, write_float, write_graph

from qdm_calibration.plan import PlanOptions
from qdm_calibration.statistics import collect_statistics
from qdm_deploy.pipeline.engine import audit_row
from qdm_deploy.pipeline.quality import compare_with, reference_run
from qdm_deploy.pipeline.speed import measure_speed
from qdm_deploy.runtime import OnnxRuntimeSession
from qdm_deploy.runtime.conditioning import conditioning_of
from qdm_deploy.samplers import step_table
from qdm_export.split_concat import split_checkpoint
from qdm_export.topology import topology_of

FORMS: tuple[Literal["none", "branch", "split"], ...] = ("none", "branch", "split")
# Seeds that no calibration uses.
FIRST_SEED = 2**40


def split_case(model: Case) -> Case:
    """The same model with its readers of skip concatenations split, measured on the same calibration set."""
    checkpoint, graph = split_checkpoint(model.checkpoint, model.graph)
    topology = topology_of(graph)
    statistics = collect_statistics(checkpoint.unet, topology, model.calibration, checkpoint.spec.num_train_timesteps)
    return dataclasses.replace(model, checkpoint=checkpoint, graph=graph, topology=topology, statistics=statistics)


def main() -> None:
    arguments = parser("None, branch and split scales at skip concatenations, on the embedded model.")
    arguments.add_argument("--seeds", type=int, default=64)
    arguments.add_argument("--steps", type=int, default=50)
    arguments.add_argument("--calibration-samples", type=int, default=16)
    arguments.add_argument("--runs", type=int, default=20)
    arguments.add_argument("--batch", type=int, default=4)
    arguments.add_argument("--sm", default="8.9")
    given = arguments.parse_args()
    model = case("fashion", samples=given.calibration_samples)
    spec = model.checkpoint.spec
    models = dict.fromkeys(FORMS, model) | {"split": split_case(model)}
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        with OnnxRuntimeSession(write_float(model, Path(scratch) / "float")) as session:
            say("float reference")
            table = step_table(model.schedule, "ddim", given.steps)
            seeds = range(FIRST_SEED, FIRST_SEED + given.seeds)
            reference = reference_run(session, table, seeds, spec, conditioning=conditioning_of(spec, given.seeds))
        sessions = {}
        for form in FORMS:
            say(form)
            plan = models[form].plan(PlanOptions(concat_scales=form))
            folder = Path(scratch) / form
            session = OnnxRuntimeSession(write_graph(models[form], plan, "onnxruntime", folder))
            sessions[form] = session
            quality, _ = compare_with(reference, session, spec, target="onnxruntime", backend="onnxruntime")
            rows[form] = {
                "form": form,
                "int8 layers": len(plan.quantized),
                "eps SQNR dB": quality.eps_sqnr_mean_db,
                "last step": quality.eps_sqnr_db[-1],
                "PSNR dB": quality.psnr_mean_db,
            }
            if find_spec("tensorrt_rtx") is not None:
                graph = write_graph(models[form], plan, "tensorrt", folder)
                engine, _ = audit_row(graph, plan, backend="tensorrt-rtx", sm=given.sm)
                rows[form] |= {"engine int8": engine.int8, "engine kernels": sum(engine.kernels.values())}
                rows[form]["kernels"] = dict(engine.kernels)
        # All three in turn in one process: ratios within one run are the point.
        for row in measure_speed(
            {(form, "int8"): session for form, session in sessions.items()}, spec, [given.batch], runs=given.runs
        ):
            rows[row.backend] |= {"median_ms": row.median_ms, "p95_ms": row.p95_ms}
        for session in sessions.values():
            session.close()
    columns = ["form", "int8 layers", "eps SQNR dB", "last step", "PSNR dB", "engine int8", "engine kernels"]
    extra = {key: value for key, value in vars(given).items() if key != "save"}
    finish("concat-forms", [*columns, "median_ms", "p95_ms"], list(rows.values()), extra, save=given.save)


if __name__ == "__main__":
    main()
