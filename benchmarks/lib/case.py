"""A model ready to be planned, and the graphs and sessions that its plans become."""

import tempfile
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from lib.random_models import random_model
from lib.results import say

from qdm_calibration.collect import collect_calibration_set
from qdm_calibration.importance import MOST_STEPS, StepImportance, measure_importance
from qdm_calibration.plan import PlanOptions, make_plan
from qdm_calibration.simulate import simulate
from qdm_calibration.statistics import collect_statistics
from qdm_calibration.timesteps import SamplingPlan
from qdm_deploy.artifacts.calibration_set import CalibrationSet
from qdm_deploy.artifacts.pipeline_spec import PipelineSpec, StatesFile
from qdm_deploy.artifacts.plan import QuantizationPlan, Target
from qdm_deploy.artifacts.statistics import ActivationStatistics
from qdm_deploy.artifacts.topology import Topology
from qdm_deploy.backends import OnnxRuntimeSession, OpenVinoSession
from qdm_deploy.building.bundle_from_checkpoint import EMBEDDED_MODEL
from qdm_deploy.building.options import BuildOptions
from qdm_deploy.building.planning import planned
from qdm_deploy.building.simulation import TorchSession
from qdm_deploy.components.encoders import open_encoder
from qdm_deploy.components.sampling import run_settings, table_for
from qdm_deploy.runtime import StepSession
from qdm_deploy.samplers import NoiseSchedule, StepTable
from qdm_deploy.samplers.conditioning import Conditioning
from qdm_deploy.samplers.sampling import Sampling
from qdm_export.float_graph import export_float_graph, save_graph
from qdm_export.shared_weights import save_with_shared_weights
from qdm_export.step_graph import StepGraph
from qdm_export.targets import emit, emit_float
from qdm_export.topology import topology_of
from qdm_export.unet import Checkpoint, load_checkpoint

# Seeds that no calibration uses.
FIRST_SEED = 2**40
# What `build` is asked for where it is to do no better than anybody: symmetric ranges, one scale for each tensor.
PLAIN: dict[str, Any] = {
    "ranges": "minmax", "zero_offset": False, "concat_scales": "none", "channel_scales": "none", "step_bins": 1,
    "keep_fp": "none", "output_correction": "none", "upsample_phases": False,
}  # fmt: skip
# Searches that run the model once for every layer are left out for these; no time depends on what they find.
_LARGE = ("ldm4", "sd15")
_NO_SEARCH = {"channel_scales": "none", "keep_fp": "none"}


@dataclass(frozen=True)
class Case:
    """A model that is loaded, exported and calibrated."""

    name: str
    checkpoint: Checkpoint
    graph: ir.Model
    topology: Topology
    statistics: ActivationStatistics
    schedule: NoiseSchedule
    calibration: CalibrationSet

    def sampling(self, table: StepTable, count: int = 4, seed: int = FIRST_SEED) -> Sampling:
        """Classes in turn, or random states where the model takes states; nothing is guided."""
        return Sampling(table, range(seed, seed + count), conditioning_of(self.checkpoint.spec, count))

    def plan(self, options: PlanOptions | None = None) -> QuantizationPlan:
        """A plan from these statistics alone."""
        return make_plan(self.checkpoint.unet, self.topology, self.statistics, options or PlanOptions())

    def built(self, **options: Any) -> QuantizationPlan:
        """The plan that `build` makes with these options (``BuildOptions``), from this calibration set."""
        given = BuildOptions(
            out=Path("unused"), sensitivity=False, **{**(_NO_SEARCH if self.name in _LARGE else {}), **options}
        )

        def importance() -> StepImportance:
            run = run_settings(given, self.checkpoint.spec, self.checkpoint.scheduler_config)
            steps = min(run.steps, MOST_STEPS)
            table = table_for(self.checkpoint.denoiser, self.schedule, run.sampler, steps)
            return measure_importance(self.checkpoint.unet, self.checkpoint.denoiser, self.sampling(table))

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
    sampling = Sampling(
        table_for(checkpoint.denoiser, schedule, "ddim", steps),
        range(seed, seed + samples),
        conditioning_of(checkpoint.spec, samples),
    )
    calibration = collect_calibration_set(checkpoint.unet, checkpoint.denoiser, sampling, SamplingPlan(samples=samples))
    topology = topology_of(graph)
    statistics = collect_statistics(checkpoint.unet, topology, calibration, checkpoint.denoiser.num_train_timesteps)
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


def conditioning_of(pipeline: PipelineSpec, count: int) -> Conditioning:
    """Classes in turn; random states for a model that takes states."""
    if not isinstance(pipeline.encoder, StatesFile):
        return open_encoder(pipeline).encode([None] * count)
    generator = np.random.default_rng(0)
    wanted = [pipeline.interface[name] for name in pipeline.encoder.inputs]
    return Conditioning({spec.name: generator.standard_normal((count, *spec.row_shape), np.float32) for spec in wanted})


def session_for(model: Case, plan: QuantizationPlan, target: Target, folder: Path) -> StepSession:
    """What runs a plan here: the target's graph on its own runtime, for `tensorrt` the simulation of its integers."""
    if target == "tensorrt":
        step = StepGraph(simulate(model.checkpoint.unet, plan, target), model.checkpoint.denoiser).eval()
        return TorchSession(step, target)
    path = write_graph(model, plan, target, folder)
    return OnnxRuntimeSession(path) if target == "onnxruntime" else OpenVinoSession(path, precision="f32")


def write_graph(model: Case, plan: QuantizationPlan, target: Target, folder: Path) -> Path:
    """Emit one target's graph into a folder of its own."""
    return save_form(emit(model.graph, plan, target).model, folder, target)


def save_form(model: ir.Model, folder: Path, target: Target) -> Path:
    """Save an emitted graph as TARGET.onnx in a folder of its own, its weights beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{target}.onnx"
    save_with_shared_weights([(path, model)], folder / f"{target}.bin")
    return path


def write_exported(model: Case, folder: Path) -> Path:
    """Write the float graph as the exporter leaves it, which is what another tool would be given."""
    return _write(model.graph.clone(), folder)


def write_float(model: Case, folder: Path) -> Path:
    """Write the float graph as a bundle holds it."""
    return _write(emit_float(model.graph).model, folder)


def _write(graph: ir.Model, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_graph(graph, folder / "float.onnx", weights="float.data")
    return folder / "float.onnx"
