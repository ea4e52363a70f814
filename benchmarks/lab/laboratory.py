"""What the rows of one calibration seed share: the model, its float run, calibration sets, statistics, measurements."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np
from lab.grids import narrowed
from lib.case import FIRST_SEED, Case, conditioning_of, write_float, write_graph
from lib.peers import CALIBRATION_STEPS
from lib.results import say

from qdm_calibration.collect import collect_calibration_set
from qdm_calibration.plan import PlanOptions
from qdm_calibration.simulate import simulate
from qdm_calibration.statistics import collect_statistics
from qdm_calibration.timesteps import SamplingPlan
from qdm_deploy.artifacts.calibration_set import CalibrationSet
from qdm_deploy.artifacts.plan import QuantizationPlan
from qdm_deploy.backends import OpenVinoSession
from qdm_deploy.building.quality import ReferenceRun, output_sqnr_db, reference_run
from qdm_deploy.building.simulation import TorchSession
from qdm_deploy.components.pictures import to_pictures
from qdm_deploy.evaluate.feature_classifier import SHIPPED, FeatureClassifier
from qdm_deploy.metrics.distribution import frechet_distance, gaussian_of
from qdm_deploy.metrics.error import psnr_per_image_db
from qdm_deploy.runtime import StepSession, denoise
from qdm_deploy.samplers import NoiseSchedule, StepTable, step_table
from qdm_deploy.samplers.sampling import Sampling
from qdm_export.float_graph import export_float_graph
from qdm_export.step_graph import StepGraph
from qdm_export.topology import topology_of
from qdm_export.unet import Checkpoint

T = TypeVar("T")

BATCH = 32
EPS, LAST = "eps SQNR dB", "last step"
FRECHET, OVER_FLOAT = "Frechet distance", "over float"
PSNR = "PSNR dB"


class Skipped(Exception):
    """A row that cannot be measured here; the message says why."""


def _option(default: Any, note: str) -> Any:
    return field(default=default, metadata={"help": note, "type": type(default)})


@dataclass(frozen=True)
class Settings:
    """Sizes of the run; each is an option of the command line, and its note is the help."""

    seeds: int = _option(64, "unseen seeds of every measurement")
    steps: int = _option(20, "denoising steps of every measurement")
    calibration_samples: int = _option(16, "trajectories of the calibration set")
    images: str = _option("", "folder with the IDX files of Fashion-MNIST, for (a)")
    reconstruct_iterations: int = _option(300, "of (e), for each block or layer")
    frechet_images: int = _option(1000, "of (e) and (f) in W4A8, under calibration seed 0 alone")
    frechet_steps: int = _option(10, "their denoising steps")
    device: str = _option("cpu", "where simulations run, cpu or cuda; decides no number beyond float32's rounding")

    def deciding(self) -> dict[str, Any]:
        """What decides a number."""
        return {name: value for name, value in asdict(self).items() if name not in ("images", "device")}


class Kept:
    """Things that several rows share, by name, each made when it is first asked for."""

    def __init__(self) -> None:
        """Nothing is made yet."""
        self._made: dict[str, Any] = {}

    def shared(self, name: str, make: Callable[[], T]) -> T:
        """The thing of that name."""
        if name not in self._made:
            self._made[name] = make()
        made: T = self._made[name]
        return made


class Model(Kept):
    """The float model and its run on the unseen seeds; the same for all calibration seeds."""

    def __init__(self, checkpoint: Checkpoint, settings: Settings) -> None:
        """Export the step graph."""
        super().__init__()
        self.checkpoint, self.settings, self.spec = checkpoint, settings, checkpoint.spec
        self.schedule = NoiseSchedule.from_config(checkpoint.scheduler_config)
        self.graph = export_float_graph(checkpoint)
        self.topology = topology_of(self.graph)
        self.seeds = range(FIRST_SEED, FIRST_SEED + settings.seeds)

    @property
    def reference(self) -> ReferenceRun:
        """The float run with DDIM."""

        def run() -> ReferenceRun:
            say("float reference")
            step = StepGraph(self.checkpoint.unet, self.checkpoint.denoiser).eval()
            session = TorchSession(step, "float", device=self.settings.device)
            table = step_table(self.schedule, "ddim", self.settings.steps)
            return reference_run(session, self.sampling(table, self.seeds), batch_size=BATCH)

        return self.shared("float run", run)

    def sampling(self, table: StepTable, seeds: range) -> Sampling:
        """Classes in turn."""
        return Sampling(table, seeds, conditioning_of(self.spec, len(seeds)))

    def frechet(self, graph: Path) -> float:
        """Frechet distance to real pictures of what a step graph makes, on OpenVINO in float32."""
        classifier = self.shared("classifier", lambda: FeatureClassifier(SHIPPED))
        real = self.shared("real pictures", lambda: gaussian_of(classifier.reference.features))
        count, table = self.settings.frechet_images, step_table(self.schedule, "ddim", self.settings.frechet_steps)
        with OpenVinoSession(graph, precision="f32") as session:
            made = denoise(session, self.sampling(table, range(count)))
        pictures = to_pictures(made, self.spec)[:, None].astype(np.float32) / 127.5 - 1.0
        return frechet_distance(real, gaussian_of(classifier.run(pictures).features))


class Laboratory(Kept):
    """Calibration sets, statistics and measurements under one calibration seed; made once, shared by the rows."""

    def __init__(self, model: Model, seed: int) -> None:
        """``seed``: of the calibration; different ones share no trajectory."""
        super().__init__()
        self.model, self.settings, self.seed = model, model.settings, seed
        self.first = seed << 20
        self.table: StepTable = step_table(model.schedule, "ddim", CALIBRATION_STEPS)

    def sampling(self, count: int) -> Sampling:
        """What calibrates: so many trajectories from this seed on."""
        return self.model.sampling(self.table, range(self.first, self.first + count))

    def trajectory(self, plan: SamplingPlan | None = None) -> CalibrationSet:
        """Rows of the float model's own trajectories; by default as `build` draws them."""
        plan = plan or SamplingPlan(samples=self.settings.calibration_samples)
        model = self.model
        return self.shared(
            f"trajectory {json.dumps(asdict(plan), sort_keys=True)}",
            lambda: collect_calibration_set(
                model.checkpoint.unet, model.checkpoint.denoiser, self.sampling(plan.samples), plan, batch_size=BATCH
            ),
        )

    def case(self, name: str = "", rows: Callable[[], CalibrationSet] | None = None) -> Case:
        """The model with the statistics of a calibration set called ``name``; by default of ``trajectory()``."""
        model = self.model

        def make() -> Case:
            found = (rows or self.trajectory)()
            unet, timesteps = model.checkpoint.unet, model.checkpoint.denoiser.num_train_timesteps
            statistics = collect_statistics(unet, model.topology, found, timesteps, batch_size=BATCH)
            return Case("fashion", model.checkpoint, model.graph, model.topology, statistics, model.schedule, found)

        return self.shared(f"case {name}", make)

    def planned(self, case: Case, options: PlanOptions) -> dict[str, float]:
        """Numbers of a plan: teacher-forced, on the simulation of the target tensorrt."""
        return self.simulated(case.checkpoint, case.plan(options))

    def simulated(self, checkpoint: Checkpoint, plan: QuantizationPlan, bits: int = 8) -> dict[str, float]:
        """Numbers of a plan that is made already, with activations of ``bits``."""
        network = narrowed(simulate(checkpoint.unet, plan, "tensorrt"), bits)
        step = StepGraph(network, checkpoint.denoiser).eval()
        return self.measured(TorchSession(step, "tensorrt", device=self.settings.device))

    def measured(self, session: StepSession) -> dict[str, float]:
        """Teacher-forced SQNR of the network's output: mean over the steps, and at the last."""
        found = output_sqnr_db(self.model.reference, session, batch_size=BATCH)
        return {EPS: fmean(found), LAST: found[-1]}

    def pictured(self, case: Case, plan: QuantizationPlan) -> dict[str, float]:
        """Frechet distance of a plan's compiled graph, and how far it is above the float graph's; {} but for seed 0."""
        if self.seed != 0:
            return {}
        with TemporaryDirectory() as folder:
            of_float = self.model.shared(
                "frechet of float", lambda: self.model.frechet(write_float(case, Path(folder, "float")))
            )
            found = self.model.frechet(write_graph(case, plan, "openvino", Path(folder, "INT8")))
        return {FRECHET: found, OVER_FLOAT: found - of_float}

    def finished(self, case: Case, plan: QuantizationPlan) -> dict[str, float]:
        """PSNR of the finished images beside the float run's, mean over the seeds; the compiled graph on OpenVINO."""
        run = self.model.reference
        with (
            TemporaryDirectory() as folder,
            OpenVinoSession(write_graph(case, plan, "openvino", Path(folder)), precision="f32") as session,
        ):
            samples = denoise(session, run.sampling)
        return {PSNR: fmean(psnr_per_image_db(run.states[-1], samples))}
