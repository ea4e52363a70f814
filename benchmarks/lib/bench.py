"""What the benchmark scripts share: the models they measure, the stages up to a plan, and how results are written."""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from lib.random_models import random_model
from numpy.typing import NDArray

from qdm_calibration.collect import collect_calibration_set
from qdm_calibration.importance import StepImportance, importance_table, measure_importance
from qdm_calibration.plan import PlanOptions, make_plan
from qdm_calibration.statistics import collect_statistics
from qdm_calibration.timesteps import SamplingPlan
from qdm_deploy.artifacts.calibration_set import CalibrationSet
from qdm_deploy.artifacts.model_spec import ModelSpec
from qdm_deploy.artifacts.plan import QuantizationPlan, Target
from qdm_deploy.artifacts.statistics import ActivationStatistics
from qdm_deploy.artifacts.topology import Topology
from qdm_deploy.backends import OnnxRuntimeSession, OpenVinoSession
from qdm_deploy.building.bundle_from_checkpoint import EMBEDDED_MODEL
from qdm_deploy.building.options import BuildOptions
from qdm_deploy.building.planning import planned
from qdm_deploy.report.machine import library_versions, machine_card
from qdm_deploy.samplers import NoiseSchedule, step_table
from qdm_export.float_graph import export_float_graph, save_graph
from qdm_export.shared_weights import save_with_shared_weights
from qdm_export.targets import emit, emit_float
from qdm_export.topology import topology_of
from qdm_export.unet import Checkpoint, load_checkpoint

__all__ = [
    "CPU_SESSIONS",
    "FIRST_SEED",
    "RESULTS",
    "Case",
    "case",
    "checkpoint_of",
    "finish",
    "parser",
    "print_table",
    "publish",
    "random_states",
    "save_form",
    "say",
    "write_exported",
    "write_float",
    "write_graph",
]

RESULTS = Path(__file__).parents[1] / "results"
# Seeds that no calibration uses.
FIRST_SEED = 2**40
CPU_SESSIONS: dict[Target, type[OnnxRuntimeSession | OpenVinoSession]] = {
    "onnxruntime": OnnxRuntimeSession,
    "openvino": OpenVinoSession,
}


@dataclass(frozen=True)
class Case:
    """A model ready to be planned: loaded, exported and calibrated."""

    name: str
    checkpoint: Checkpoint
    graph: ir.Model
    topology: Topology
    statistics: ActivationStatistics
    schedule: NoiseSchedule
    calibration: CalibrationSet

    def plan(self, options: PlanOptions | None = None) -> QuantizationPlan:
        """A plan from these statistics alone."""
        return make_plan(self.checkpoint.unet, self.topology, self.statistics, options or PlanOptions())

    def built(self, **options: Any) -> QuantizationPlan:
        """The plan that `build` makes with these options (``BuildOptions``), from this calibration set."""
        given = BuildOptions(out=Path("unused"), sensitivity=False, **options)
        spec = self.checkpoint.spec

        def importance() -> StepImportance:
            steps = given.steps
            table = importance_table(self.schedule, given.sampler, steps, learned_variance=spec.learned_variance)
            return measure_importance(self.checkpoint.unet, spec, table)

        return planned(
            given, self.checkpoint, self.topology, self.calibration, self.statistics,
            importance=importance, stage=lambda name: nullcontext(),
        ).plan  # fmt: skip


def case(name: str, *, samples: int, steps: int = 50, seed: int = 0) -> Case:
    """Load, export and calibrate a model by its name (``checkpoint_of``)."""
    say(f"{name}: loading, exporting, calibrating")
    checkpoint = checkpoint_of(name)
    graph = export_float_graph(checkpoint)
    schedule = NoiseSchedule.from_config(checkpoint.scheduler_config)
    table = step_table(schedule, "ddim", steps)
    calibration = collect_calibration_set(
        checkpoint.unet, checkpoint.spec, table, SamplingPlan(samples=samples), seed=seed,
        conditioning=random_states(checkpoint.spec, samples),
    )  # fmt: skip
    topology = topology_of(graph)
    statistics = collect_statistics(checkpoint.unet, topology, calibration, checkpoint.spec.num_train_timesteps)
    return Case(name, checkpoint, graph, topology, statistics, schedule, calibration)


def case_to_time(name: str) -> Case:
    """A case whose steps are timed: only the embedded model, whose weights are trained, needs a real calibration."""
    return case(name, samples=16, steps=50) if name == "fashion" else case(name, samples=2, steps=5)


def checkpoint_of(name: str) -> Checkpoint:
    """The embedded model ("fashion"), or one of ``RANDOM_MODELS``."""
    if name == "fashion":
        return load_checkpoint(EMBEDDED_MODEL)
    with tempfile.TemporaryDirectory() as folder:
        return load_checkpoint(random_model(name, Path(folder)))


def random_states(spec: ModelSpec, count: int) -> dict[str, NDArray[np.float32]]:
    """Text states [N, L, D] for a model that takes them, else nothing."""
    generator = np.random.default_rng(0)
    return {
        item.name: generator.standard_normal((count, *item.shape), np.float32)
        for item in spec.conditioning
        if item.name == "encoder_hidden_states"
    }


def write_graph(case: Case, plan: QuantizationPlan, target: Target, folder: Path) -> Path:
    """Emit one target's graph into a folder of its own."""
    return save_form(emit(case.graph, plan, target).model, folder, target)


def save_form(model: ir.Model, folder: Path, target: Target = "tensorrt") -> Path:
    """Save an emitted graph as TARGET.onnx in a folder of its own, its weights beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{target}.onnx"
    save_with_shared_weights([(path, model)], folder / f"{target}.bin")
    return path


def write_exported(case: Case, folder: Path) -> Path:
    """Write the float graph as the exporter leaves it, which is what another tool would be given."""
    folder.mkdir(parents=True, exist_ok=True)
    save_graph(case.graph.clone(), folder / "float.onnx", weights="float.data")
    return folder / "float.onnx"


def write_float(case: Case, folder: Path) -> Path:
    """Write the float graph as a bundle holds it into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_graph(emit_float(case.graph).model, folder / "float.onnx", weights="float.data")
    return folder / "float.onnx"


def parser(description: str) -> argparse.ArgumentParser:
    """Arguments that every benchmark takes."""
    arguments = argparse.ArgumentParser(description=description)
    arguments.add_argument("--save", action="store_true", help="also write the JSON line to benchmarks/results/")
    return arguments


def finish(
    name: str, columns: Sequence[str], rows: Sequence[dict[str, Any]], extra: dict[str, Any], *, save: bool
) -> None:
    """Print a table, then the whole result as one JSON line; with ``save`` keep that line as a file."""
    print_table(columns, rows)
    publish(name, rows, extra, save=save)


def print_table(columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    """Print rows under their columns; numbers with two decimals."""
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(column), *(len(line[i]) for line in cells)) for i, column in enumerate(columns)]
    for line in [list(columns), ["-" * width for width in widths], *cells]:
        print(
            "  ".join(
                text.rjust(width) if i else text.ljust(width)
                for i, (text, width) in enumerate(zip(line, widths, strict=True))
            )
        )


def publish(name: str, rows: Sequence[dict[str, Any]], extra: dict[str, Any], *, save: bool) -> None:
    """Print the whole result as one JSON line; with ``save`` keep that line as a file."""
    now = datetime.now(UTC)
    document = {
        "benchmark": name,
        "created": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "machine": machine_card(),
        "versions": library_versions(),
        **extra,
        "rows": list(rows),
    }
    line = json.dumps(document, sort_keys=True)
    if save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{now:%Y-%m-%d}-{name}.json").write_text(line + "\n", encoding="utf-8")
    print(line)


def say(text: str) -> None:
    """A line for the person who waits; the result alone goes to standard output."""
    print(text, file=sys.stderr, flush=True)


def _cell(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else "" if value is None else str(value)
