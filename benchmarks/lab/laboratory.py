"""What the rows of one calibration seed share: the model, its float run, calibration sets, statistics, sessions."""

import dataclasses
import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np
from concat_forms import split_case
from lib.bench import FIRST_SEED, Case, say, write_float, write_graph
from lib.made_pictures import features_of_made
from lib.peer_models import CALIBRATION_STEPS
from qdm_deploy.components.conditioning import conditioning_of

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
from qdm_deploy.evaluate.feature_classifier import SHIPPED, FeatureClassifier
from qdm_deploy.metrics.distribution import frechet_distance, gaussian_of
from qdm_deploy.metrics.error import psnr_per_image_db
from qdm_deploy.runtime import StepSession, denoise
from qdm_deploy.samplers import NoiseSchedule, StepTable, step_table
from qdm_export.float_graph import export_float_graph
from qdm_export.step_graph import StepGraph
from qdm_export.topology import topology_of
from qdm_export.unet import Checkpoint

__all__ = ["BATCH", "EPS", "FRECHET", "LAST", "OVER_FLOAT", "PSNR", "Laboratory", "Model", "Settings"]

T = TypeVar("T")

BATCH = 32
EPS, LAST = "eps SQNR dB", "last step"
FRECHET, OVER_FLOAT = "Frechet distance", "over float"
PSNR = "PSNR dB"
# Statistics of one calibration set are some 100 MB; those of the set that most rows share, and of the row at hand.
_KEPT_STATISTICS = 2


@dataclass(frozen=True)
class Settings:
    """Sizes of the run.

    Attributes:
        seeds: unseen seeds of every measurement.
        steps: denoising steps of every measurement.
        samples: trajectories of the calibration set.
        images: folder with the IDX files of Fashion-MNIST; None leaves out the rows that need real images.
        cache: where calibration sets are kept; None keeps them in memory.
        iterations: of reconstruction, per block or layer.
        frechet_images, frechet_steps: pictures of a Frechet distance, and their denoising steps; it is taken under
            calibration seed 0 alone.
        scratch: a folder for graphs, removed with the run.
        device: where the simulations run, "cpu" or "cuda"; it decides no number beyond float32's rounding.
    """

    seeds: int
    steps: int
    samples: int
    images: Path | None
    cache: Path | None
    iterations: int
    scratch: Path
    frechet_images: int = 1000
    frechet_steps: int = 10
    device: str = "cpu"


class Model:
    """The float model and its run on the unseen seeds; the same for all calibration seeds."""

    def __init__(self, checkpoint: Checkpoint, settings: Settings) -> None:
        """Export, and run the float network once."""
        self.checkpoint, self.settings, self.spec = checkpoint, settings, checkpoint.spec
        self.schedule = NoiseSchedule.from_config(checkpoint.scheduler_config)
        self.graph = export_float_graph(checkpoint)
        self.topology = topology_of(self.graph)
        self.weights = weights_sha256(checkpoint)
        self.seeds = range(FIRST_SEED, FIRST_SEED + settings.seeds)
        self.conditioning = conditioning_of(self.spec, settings.seeds)
        self._shared: dict[str, Any] = {}

    def shared(self, name: str, make: Callable[[], T]) -> T:
        """What rows of all calibration seeds share, made when it is first needed."""
        return _once(self._shared, name, make)

    @property
    def reference(self) -> ReferenceRun:
        """The float run with DDIM."""

        def run() -> ReferenceRun:
            say("float reference")
            session = TorchSession(
                StepGraph(self.checkpoint.unet, self.spec).eval(), "float", device=self.settings.device
            )
            table = step_table(self.schedule, "ddim", self.settings.steps)
            return reference_run(
                session, table, self.seeds, self.spec, conditioning=self.conditioning, batch_size=BATCH
            )

        return self.shared("float run", run)

    def frechet(self, graph: Path) -> float:
        """Frechet distance to real pictures of what a step graph makes, on OpenVINO in float32."""
        classifier = self.shared("classifier", lambda: FeatureClassifier(SHIPPED))
        real = self.shared("real pictures", lambda: gaussian_of(classifier.reference.features))
        table = step_table(self.schedule, "ddim", self.settings.frechet_steps)
        with OpenVinoSession(graph, precision="f32") as session:
            made = features_of_made(session, table, self.spec, self.settings.frechet_images, classifier)
        return frechet_distance(real, gaussian_of(made.features))


class Laboratory:
    """Calibration sets, statistics and measurements under one calibration seed; made once, shared by the rows."""

    def __init__(self, model: Model, seed: int) -> None:
        """``seed``: of the calibration; different ones share no trajectory."""
        self.model, self.settings, self.seed = model, model.settings, seed
        self.first = seed << 20
        self.table: StepTable = step_table(model.schedule, "ddim", CALIBRATION_STEPS)
        self._sets: dict[str, CalibrationSet] = {}
        self._cases: OrderedDict[str, Case] = OrderedDict()
        self._shared: dict[str, Any] = {}

    def shared(self, name: str, make: Callable[[], T]) -> T:
        """What rows of this calibration seed share, made when it is first needed."""
        return _once(self._shared, name, make)

    def trajectory(self, plan: SamplingPlan | None = None) -> CalibrationSet:
        """Rows of the float model's own trajectories; by default as `build` draws them."""
        plan = plan or SamplingPlan(samples=self.settings.samples)
        return self.kept(
            f"trajectory {json.dumps(dataclasses.asdict(plan), sort_keys=True)}",
            lambda: collect_calibration_set(
                self.model.checkpoint.unet, self.model.spec, self.table, plan, seed=self.first, batch_size=BATCH
            ),
        )

    def kept(self, name: str, make: Callable[[], CalibrationSet]) -> CalibrationSet:
        """The calibration set of that name, made once; with a cache folder also once over several runs.

        ``name`` says everything but model, seed and number of samples.
        """
        if name not in self._sets:
            path = self._file(name)
            if path is not None and path.is_file():
                self._sets[name] = CalibrationSet.load(path)
            else:
                self._sets[name] = make()
                if path is not None:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    self._sets[name].save(path)
        return self._sets[name]

    def _file(self, name: str) -> Path | None:
        if self.settings.cache is None:
            return None
        identity = f"{name}\0{self.model.weights}\0{self.seed}\0{self.settings.samples}"
        return self.settings.cache / f"set-{hashlib.sha256(identity.encode()).hexdigest()[:24]}.safetensors"

    def case(self, name: str = "", calibration: CalibrationSet | None = None, *, split: bool = False) -> Case:
        """The model with the statistics of a calibration set called ``name``; by default of ``trajectory()``.

        ``split``: with its readers of skip concatenations split.
        """
        key = f"{name} split" if split else name
        if key not in self._cases:
            if split:
                self._cases[key] = split_case(self.case(name, calibration))
            else:
                rows = self.trajectory() if calibration is None else calibration
                model = self.model
                statistics = collect_statistics(
                    model.checkpoint.unet, model.topology, rows, model.spec.num_train_timesteps, batch_size=BATCH
                )
                self._cases[key] = Case(
                    "fashion", model.checkpoint, model.graph, model.topology, statistics, model.schedule, rows
                )
        self._cases.move_to_end(key)
        while len(self._cases) > _KEPT_STATISTICS:
            self._cases.popitem(last=False)
        return self._cases[key]

    def planned(self, case: Case, options: PlanOptions) -> dict[str, float]:
        """Numbers of a plan: teacher-forced, on the simulation of the target tensorrt."""
        return self.simulated(case.checkpoint, case.plan(options))

    def simulated(self, checkpoint: Checkpoint, plan: QuantizationPlan) -> dict[str, float]:
        """Numbers of a plan that is made already; plans that round alike are measured once."""

        def numbers() -> dict[str, float]:
            step = StepGraph(simulate(checkpoint.unet, plan, "tensorrt"), checkpoint.spec).eval()
            return self.measured(TorchSession(step, "tensorrt", device=self.settings.device))

        return self.shared(f"simulated {_rounding(plan)}", numbers)

    def pictured(self, case: Case, plan: QuantizationPlan) -> dict[str, float]:
        """Frechet distance of a plan's compiled graph, and how far it is above the float graph's; {} but for seed 0."""
        if self.seed != 0:
            return {}

        def distance() -> float:
            with TemporaryDirectory(dir=self.settings.scratch) as folder:
                return self.model.frechet(write_graph(case, plan, "openvino", Path(folder)))

        def of_float() -> float:
            with TemporaryDirectory(dir=self.settings.scratch) as folder:
                return self.model.frechet(write_float(case, Path(folder)))

        found = self.shared(f"frechet {_rounding(plan)}", distance)
        return {FRECHET: found, OVER_FLOAT: found - self.model.shared("frechet of float", of_float)}

    def finished(self, case: Case, plan: QuantizationPlan) -> dict[str, float]:
        """PSNR of the finished images beside the float run's, mean over the seeds; the compiled graph on OpenVINO."""

        def numbers() -> dict[str, float]:
            reference = self.model.reference
            with (
                TemporaryDirectory(dir=self.settings.scratch) as folder,
                OpenVinoSession(write_graph(case, plan, "openvino", Path(folder)), precision="f32") as session,
            ):
                samples = denoise(
                    session, reference.table, reference.seeds, self.model.spec, conditioning=reference.conditioning
                )
            return {PSNR: fmean(psnr_per_image_db(reference.states[-1], samples))}

        return self.shared(f"finished {_rounding(plan)}", numbers)

    def measured(self, session: StepSession) -> dict[str, float]:
        """Teacher-forced SQNR of the network's output: mean over the steps, and at the last."""
        found = output_sqnr_db(self.model.reference, session, self.model.spec, batch_size=BATCH)
        return {EPS: fmean(found), LAST: found[-1]}


def _once(kept: dict[str, Any], name: str, make: Callable[[], T]) -> T:
    if name not in kept:
        kept[name] = make()
    found: T = kept[name]
    return found


def _rounding(plan: QuantizationPlan) -> str:
    """Digest of all that decides what a plan computes: not of the notes on why."""
    digest = hashlib.sha256(plan.timestep_edges.tobytes())
    for layer in plan.layers:
        for field in dataclasses.fields(layer):
            value = getattr(layer, field.name)
            if field.name not in ("notes", "reason", "weight_sqnr_db"):
                digest.update(value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode())
    return digest.hexdigest()


def weights_sha256(checkpoint: Checkpoint) -> str:
    """Digest of all weights by name."""
    digest = hashlib.sha256()
    for name, value in sorted(checkpoint.unet.state_dict().items()):
        digest.update(name.encode() + b"\0" + np.ascontiguousarray(value.numpy()).tobytes())
    return digest.hexdigest()
