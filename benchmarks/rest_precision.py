"""What the type of the floating-point rest costs on the `tensorrt` graph of the embedded model: float16 or bfloat16.

Each graph is run on OpenVINO with the constants it ships: float16 as it is (computed in float32), bfloat16 widened to
float32 and computed in bfloat16 where the CPU has it. Teacher-forced SQNR on rows of unseen trajectories, and the
kernels of a TensorRT-RTX engine of each.

    python benchmarks/rest_precision.py --save
"""

import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from lib.bench import FIRST_SEED, Case, case, finish, parser, say, write_float
from numpy.typing import NDArray

from qdm_calibration.collect import collect_calibration_set
from qdm_calibration.timesteps import SamplingPlan
from qdm_deploy.building.checks import run_graph
from qdm_deploy.building.engine_audit import audit_row
from qdm_deploy.metrics.error import sqnr_per_step_db
from qdm_deploy.runtime.random_inputs import random_inputs
from qdm_deploy.samplers import step_table
from qdm_deploy.samplers.columns import NO_CLIP
from qdm_export.check import widened
from qdm_export.float_graph import save_graph
from qdm_export.targets import Rest, emit

_BATCH = 64


def rows_of(model: Case, seeds: int, steps: int) -> dict[str, NDArray[Any]]:
    """Step graph inputs along unseen trajectories, with coefficients that return the network's output as x0."""
    table = step_table(model.schedule, "ddim", steps)
    found = collect_calibration_set(
        model.checkpoint.unet, model.checkpoint.spec, table, SamplingPlan(samples=seeds, steps=steps), seed=FIRST_SEED
    )
    inputs = random_inputs(model.checkpoint.spec, len(found))
    inputs["sample"], inputs["timestep"] = found.sample, found.timestep
    inputs["class_labels"] = found.conditioning["class_labels"]
    inputs["coefficients"][:, :3] = 0.0, 1.0, NO_CLIP
    return inputs


def output(path: Path, inputs: dict[str, NDArray[Any]], precision: str) -> NDArray[np.float32]:
    """The network's output on OpenVINO."""
    parts = []
    for start in range(0, len(inputs["sample"]), _BATCH):
        batch = {name: value[start : start + _BATCH] for name, value in inputs.items()}
        # Rows of this batch, not of all.
        batch["unconditional_row"] = batch["owner_row"] = np.arange(len(batch["sample"]), dtype=np.int64)
        parts.append(run_graph("openvino", path, batch, precision=precision)["x0"])
    return np.concatenate(parts)


def main() -> None:
    arguments = parser("Float16 or bfloat16 around the INT8 kernels, on the embedded model.")
    arguments.add_argument("--seeds", type=int, default=16)
    arguments.add_argument("--steps", type=int, default=20)
    arguments.add_argument("--calibration-samples", type=int, default=16)
    arguments.add_argument("--sm", default="8.9")
    given = arguments.parse_args()
    model = case("fashion", samples=given.calibration_samples)
    plan = model.built()
    inputs = rows_of(model, given.seeds, given.steps)
    last = inputs["timestep"] == inputs["timestep"].min()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        plain = write_float(model, folder)
        reference = output(plain, inputs, "f32")

        def row(name: str, path: Path, precision: str) -> dict[str, Any]:
            say(name)
            found = np.array(sqnr_per_step_db(reference, output(path, inputs, precision)))
            return {"graph": name, "eps SQNR dB": fmean(found), "last step": fmean(found[last]), "worst": found.min()}

        rows.append(row("bfloat16 without INT8", plain, "bf16"))
        rests: tuple[tuple[Rest, str], ...] = (("fp16", "f32"), ("bf16", "bf16"))
        for rest, precision in rests:
            path = folder / f"{rest}.onnx"
            save_graph(emit(model.graph, plan, "tensorrt", rest=rest).model, path, weights=f"{rest}.data")
            engine, _ = audit_row(path, plan, backend="tensorrt-rtx", sm=given.sm)
            wide = folder / f"{rest}.wide.onnx"
            save_graph(widened(path), wide, weights=f"{rest}.wide.data")
            counts = engine.kernels or {}
            if rest == "bf16":
                # What its constants cost alone: biases, factors and scales of 8 bits, float32 arithmetic.
                rows.append(row("INT8, bf16 constants", wide, "f32"))
            rows.append(
                row(f"INT8, {rest} rest", wide, precision)
                | {"planned": engine.planned, "INT8": engine.int8}
                | {key: counts.get(key) for key in ("kernels", "quantizes", "requantizes", "moves")}
            )
    columns = ["graph", "eps SQNR dB", "last step", "worst", "planned", "INT8", "kernels", "quantizes", "requantizes"]
    finish(
        "rest-precision",
        [*columns, "moves"],
        rows,
        {"seeds": given.seeds, "steps": given.steps, "sampler": "ddim", "sm": given.sm},
        save=given.save,
    )


if __name__ == "__main__":
    main()
