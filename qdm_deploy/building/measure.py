"""What a build measures on its own graphs before it publishes them: correctness, quality, speed."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.artifacts.pipeline_spec import Denoiser
from qdm_deploy.artifacts.plan import QuantizationPlan, Target
from qdm_deploy.backends import OnnxRuntimeSession, OpenVinoSession, automatic_backend
from qdm_deploy.building.checks import (
    check_bfloat16_graph,
    check_float_graph,
    check_half_graph,
    check_integer_kernels,
    check_layers,
    run_graph,
)
from qdm_deploy.building.options import BuildOptions
from qdm_deploy.building.quality import ReferenceRun, compare_with, reference_run
from qdm_deploy.building.simulation import TorchSession
from qdm_deploy.building.speed import measure_speed, speedup_of
from qdm_deploy.components.decoder import decoder_in
from qdm_deploy.components.sampling import SamplingMaker
from qdm_deploy.progress import Progress
from qdm_deploy.report.model import CheckRow, QualityRow, SpeedRow
from qdm_deploy.runtime import StepSession
from qdm_deploy.samplers import NO_CLIP, column
from qdm_deploy.samplers.conditioning import rows_of
from qdm_deploy.samplers.random_inputs import random_inputs

if TYPE_CHECKING:
    import onnx_ir as ir

    from qdm_export.unet import Checkpoint

__all__ = ["Measured", "measure", "unseen_seeds"]

# Far from any calibration seed, so that nobody is judged on what was calibrated.
_UNSEEN = 2**40
_SPEED_BATCHES = (4, 16)
# What the activations of a timed batch may take, by the size of all layers' inputs and results.
_SPEED_BYTES = 4 << 30
# Float weights up to which the sessions of a backend are timed in turn, both open; larger ones one after the other.
_TOGETHER_BYTES = 1 << 30
_CHECK_ROWS = 6
# A check holds the input and the result of every quantized layer.
_CHECK_BYTES = 1 << 30

Key = tuple[str, Literal["int8", "float"]]


@dataclass(frozen=True)
class Measured:
    """Everything a report needs of a set of graphs.

    Attributes:
        reference: the float run.
        shown: pictures of its samples, [N, C, H, W]; None where nothing makes pictures of them.
        pictures: the same of each target.
        backend: what a user of this machine would get by default.
        speedup: float over INT8 on it, at the smallest measured batch.
    """

    checks: tuple[CheckRow, ...]
    quality: tuple[QualityRow, ...]
    speed: tuple[SpeedRow, ...]
    speedup: float | None
    backend: str
    reference: ReferenceRun
    shown: NDArray[np.float32] | None
    pictures: Mapping[Target, NDArray[np.float32]]


def unseen_seeds(options: BuildOptions) -> range:
    """The seeds of the paired comparison."""
    return range(_UNSEEN + options.seed, _UNSEEN + options.seed + options.verify_samples)


def measure(
    options: BuildOptions,
    checkpoint: "Checkpoint",
    plan: QuantizationPlan,
    maker: SamplingMaker,
    float_graph: "ir.Model",
    folder: Path,
    scratch: Path,
    stage: Callable[[str], AbstractContextManager[None]],
    progress: Progress,
) -> Measured:
    """Check, compare and time the graphs that were written into ``folder``.

    No more sessions are open at a time than one of its comparisons needs: each holds the weights once or twice.
    """
    from qdm_export.check import bytes_per_row

    spec = checkpoint.spec
    opened = _Sessions(options, folder)
    default = automatic_backend(tuple(options.targets))
    verify_table = maker.table_of(maker.run.sampler, options.verify_steps)
    with stage("compare"):
        progress.say("Comparing INT8 with float on unseen seeds")
        with opened("onnxruntime", "float") as session:
            sampling = maker.make(unseen_seeds(options), table=verify_table)
            reference = reference_run(session, sampling, progress=progress)
        decoder = decoder_in(spec, folder.parent, default, threads=options.threads)
        shown = None if decoder is None else decoder.decode(reference.states[-1], progress=progress)
        quality, pictures = [], {}
        for target in options.targets:
            judge = target if opened.has(target) else "simulation"
            with opened(target, "int8") if opened.has(target) else simulation_of(checkpoint, plan, target) as session:
                row, pictures[target] = compare_with(
                    reference, session, shown=shown, decoder=decoder, target=target, backend=judge, progress=progress
                )
            quality.append(row)
        if decoder is not None:
            decoder.close()
    row_bytes = max(bytes_per_row(float_graph, plan), 1)
    with stage("check"):
        inputs = trajectory_inputs(spec.denoiser, reference, min(max(_CHECK_BYTES // row_bytes, 1), _CHECK_ROWS))
        checks = _checks(options, checkpoint, plan, float_graph, folder, scratch, inputs, progress)
    with stage("speed"):
        batches = tuple(batch for batch in _SPEED_BATCHES if batch * row_bytes <= _SPEED_BYTES) or (1,)
        speed: tuple[SpeedRow, ...] = ()
        for group in opened.timed_together():
            with ExitStack() as sessions:
                timed = {key: sessions.enter_context(opened(*key)) for key in group}
                speed += measure_speed(timed, spec.denoiser, batches, progress=progress)
    speedup = speedup_of(speed, default, batches[0])
    return Measured(checks, tuple(quality), speed, speedup, default, reference, shown, pictures)


class _Sessions:
    """Opens what this machine can run of the graphs in a folder, as `generate` does: for throughput."""

    def __init__(self, options: BuildOptions, folder: Path) -> None:
        self._threads, self._folder = options.threads, folder
        openvino = "openvino" in options.targets and find_spec("openvino") is not None
        self.backends = ("onnxruntime", "openvino") if openvino else ("onnxruntime",)

    def timed_together(self) -> list[list[Key]]:
        """What is timed in turn: float and INT8 of a backend, or each alone where both would take too much memory."""
        files = [self._folder / name for name in ("float.onnx", "float.data")]
        together = sum(path.stat().st_size for path in files if path.exists()) <= _TOGETHER_BYTES
        pairs: list[list[Key]] = [[(backend, "float"), (backend, "int8")] for backend in self.backends]
        return pairs if together else [[key] for pair in pairs for key in pair]

    def has(self, target: Target) -> bool:
        """Whether a target's own runtime is here."""
        return target in self.backends

    def __call__(self, backend: str, precision: Literal["int8", "float"]) -> StepSession:
        graph = self._folder / f"{backend if precision == 'int8' else 'float'}.onnx"
        if backend == "onnxruntime":
            return OnnxRuntimeSession(graph, threads=self._threads, mode="throughput")
        rest: Literal["auto", "f32"] = "auto" if precision == "int8" else "f32"
        return OpenVinoSession(graph, threads=self._threads, precision=rest, mode="throughput")


def simulation_of(checkpoint: "Checkpoint", plan: QuantizationPlan, target: Target) -> TorchSession:
    """A session on the simulated integers of a target."""
    from qdm_calibration.simulate import simulate
    from qdm_export.step_graph import StepGraph

    return TorchSession(StepGraph(simulate(checkpoint.unet, plan, target), checkpoint.denoiser).eval(), target)


def _checks(
    options: BuildOptions,
    checkpoint: "Checkpoint",
    plan: QuantizationPlan,
    float_graph: "ir.Model",
    folder: Path,
    scratch: Path,
    inputs: Mapping[str, NDArray[Any]],
    progress: Progress,
) -> tuple[CheckRow, ...]:
    targets, checks = options.targets, []
    with progress.task("Checking graphs", len(targets) + 2) as advance:
        random = random_inputs(checkpoint.denoiser, _CHECK_ROWS, seed=_UNSEEN + options.seed)
        checks.append(check_float_graph(run_graph("onnxruntime", folder / "float.onnx", random), checkpoint, random))
        optimized = scratch / "optimized.onnx"
        run_graph("onnxruntime", folder / "onnxruntime.onnx", inputs, optimized=optimized)
        checks.append(check_integer_kernels(plan, optimized))
        advance()
        for target in targets:
            if target == "onnxruntime" or find_spec("openvino") is not None:
                checks.append(check_layers(checkpoint, plan, target, float_graph, inputs, scratch))
            advance()
        if "tensorrt" in targets and find_spec("openvino") is not None:
            expected = run_graph("onnxruntime", folder / "float.onnx", inputs)["x0"]
            with simulation_of(checkpoint, plan, "tensorrt") as session:
                simulated = session.run(inputs).x0
            graph = folder / "tensorrt.onnx"
            if options.rest == "bf16":
                checks.append(check_bfloat16_graph(graph, folder / "float.onnx", expected, simulated, inputs, scratch))
            else:
                checks.append(check_half_graph(graph, expected, simulated, inputs))
        advance()
    return tuple(checks)


def trajectory_inputs(denoiser: Denoiser, reference: ReferenceRun, rows: int = _CHECK_ROWS) -> dict[str, NDArray[Any]]:
    """Inputs of the step graph from the float run's own trajectory: one row per sample, each at another step.

    Coefficients p, q and clip are set so that the graph returns the network's output as x0: clipping would hide errors.
    """
    sampling = reference.sampling
    steps, count = reference.inputs.shape[:2]
    picked = np.linspace(0, steps - 1, rows).round().astype(np.int64)
    sample = np.arange(rows) % count
    inputs = random_inputs(denoiser, rows)
    inputs["sample"] = np.ascontiguousarray(reference.inputs[picked, sample])
    inputs["timestep"][:] = sampling.table.timesteps[picked]
    inputs["coefficients"] = sampling.table.coefficients[picked].copy()
    for name, value in (("p", 0.0), ("q", 1.0), ("clip", NO_CLIP)):
        inputs["coefficients"][:, column(name)] = value
    inputs |= rows_of(sampling.conditioning.take(sample), rows, 1)
    return inputs
