"""Milliseconds per denoising step: INT8 beside FP32, every session timed in turn in one process.

The embedded model and the DDPM CIFAR-10 architecture (35.7 M parameters, random weights), batch 4 and 16. Ratios within
one run are the point; times move with the machine.

    python benchmarks/step_latency.py --save
"""

import tempfile
from pathlib import Path
from typing import Any, Literal

from bench import Case, case, finish, parser, say, write_float, write_graph

from qdm_deploy.pipeline.simulation import TorchSession
from qdm_deploy.pipeline.speed import measure_speed, speedup_of
from qdm_deploy.runtime import OnnxRuntimeSession, OpenVinoSession, StepSession
from qdm_export.step_graph import StepGraph


def sessions(model: Case, folder: Path) -> dict[tuple[str, Literal["int8", "float"]], StepSession]:
    """Everything that is timed for one model."""
    plan = model.built()
    float_graph = write_float(model, folder)
    return {
        ("torch eager", "float"): TorchSession(StepGraph(model.checkpoint.unet, model.checkpoint.spec).eval(), "float"),
        ("onnxruntime", "float"): OnnxRuntimeSession(float_graph),
        ("onnxruntime", "int8"): OnnxRuntimeSession(write_graph(model, plan, "onnxruntime", folder)),
        ("openvino", "float"): OpenVinoSession(float_graph, precision="f32"),
        ("openvino", "int8"): OpenVinoSession(write_graph(model, plan, "openvino", folder)),
    }


def main() -> None:
    arguments = parser("Time per denoising step, INT8 beside FP32.")
    arguments.add_argument("--models", default="fashion,cifar10")
    arguments.add_argument("--batches", default="4,16")
    arguments.add_argument("--runs", type=int, default=20)
    given = arguments.parse_args()
    rows: list[dict[str, Any]] = []
    for name in given.models.split(","):
        model = case(name, samples=16 if name == "fashion" else 2, steps=50 if name == "fashion" else 5)
        with tempfile.TemporaryDirectory() as scratch:
            opened = sessions(model, Path(scratch))
            say(f"{name}: timing {len(opened)} sessions in turn")
            batches = [int(batch) for batch in given.batches.split(",")]
            measured = measure_speed(opened, model.checkpoint.spec, batches, runs=given.runs)
            for session in opened.values():
                session.close()
        for row in measured:
            speedup = speedup_of(measured, row.backend, row.batch) if row.precision == "int8" else None
            rows.append({"model": name, **row.model_dump(), "over float": speedup})
    columns = ["model", "batch", "backend", "precision", "median_ms", "p95_ms", "over float"]
    finish(
        "step-latency",
        columns,
        sorted(rows, key=lambda row: (row["model"], row["batch"])),
        {"runs": given.runs},
        save=given.save,
    )


if __name__ == "__main__":
    main()
