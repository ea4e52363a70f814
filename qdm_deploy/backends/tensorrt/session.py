"""The step graph on an NVIDIA GPU: TensorRT and TensorRT-RTX, one code path.

One step is: the engine's kernels, then two copies on the device that make ``next_sample`` the next ``sample`` and
``next_history`` the next ``history``. A loop of steps therefore needs from the host only what the host makes (timestep,
coefficients, noise), which goes ahead through a ring of page-locked buffers; the host waits once, at the end.
"""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from numpy.typing import NDArray

from qdm_deploy.artifacts.files import sha256_of
from qdm_deploy.backends.tensorrt.cuda import CudaRuntime
from qdm_deploy.backends.tensorrt.cuda_graphs import StepGraphs
from qdm_deploy.backends.tensorrt.cuda_memory import DeviceTensors, Staging, StagingRing, row_bytes
from qdm_deploy.backends.tensorrt.engine import StepEngine
from qdm_deploy.engines.cache import EngineCache
from qdm_deploy.engines.engine import Engine, engine_from_onnx
from qdm_deploy.engines.flavour import Flavour, flavour_of
from qdm_deploy.engines.gpu import Gpu, installed_gpu
from qdm_deploy.engines.request import BatchProfile, BuildOptions
from qdm_deploy.errors import BundleError, EngineRefused, InputError
from qdm_deploy.progress import SILENT, Progress
from qdm_deploy.runtime.session import StepInputs, StepOutput, check_inputs, check_tensor

__all__ = ["KEPT_BATCH_SIZES", "TensorRtSession", "open_tensorrt"]

KEPT_BATCH_SIZES = 4
_EACH_STEP = ("timestep", "coefficients", "noise")


def open_tensorrt(
    graph: Path,
    backend: str,
    *,
    profile: BatchProfile | None = None,
    options: BuildOptions | None = None,
    cache: EngineCache | None = None,
    cuda_graphs: bool = True,
    kept_batch_sizes: int = KEPT_BATCH_SIZES,
    progress: Progress = SILENT,
) -> "TensorRtSession":
    """Open a step graph on the GPU of this machine: its engine comes from the cache, or is built now.

    An engine from the cache that the library refuses to load is removed and built once more.

    Args:
        graph: The ``.onnx`` file; its external data lies beside it.
        backend: "tensorrt" or "tensorrt-rtx".
        profile: Batch sizes; 1 to 16, fastest at 4, by default.
        options: Builder options.
        cache: Where engines are kept; the user's cache folder by default.
        cuda_graphs: Whether steps are recorded and replayed; off only to measure what that gains.
        kept_batch_sizes: As for ``TensorRtSession``.
        progress: Told about the build.

    Raises:
        EnvironmentProblem: The library, cuda-bindings, the driver or the GPU is missing, or the cache cannot be used.
        InputError: The library cannot build for this GPU.
        EngineError: The engine cannot be built or loaded.
        BundleError: The file is not a step graph.
        ResourceProblem: Memory or disk ran out.
    """
    flavour = flavour_of(backend)
    flavour.load()
    gpu = installed_gpu(backend)
    cuda = CudaRuntime()
    if not graph.is_file():
        raise BundleError(f"the step graph {graph} does not exist; verify the bundle or build it again")
    cache = cache or EngineCache()
    sm = gpu.capability if flavour.capabilities else None

    def build() -> Engine:
        return engine_from_onnx(
            graph,
            backend=backend,
            sm=sm,
            profile=profile,
            options=options,
            cache=cache,
            planned=(),  # `build` and `engine build` judge the plan; here it only has to run
            progress=progress,
        )

    def load(engine: Engine) -> TensorRtSession:
        return TensorRtSession(
            flavour,
            engine.path,
            cuda,
            gpu=gpu,
            graph_sha256=sha256_of(graph),
            cuda_graphs=cuda_graphs,
            kept_batch_sizes=kept_batch_sizes,
        )

    engine = build()
    try:
        return load(engine)
    except (EngineRefused, FileNotFoundError) as error:
        # Not found: another process made room in the cache just now. What was built a moment ago and is refused, would
        # be refused again. Other errors are the GPU's, and say nothing against the engine.
        if not engine.from_cache and isinstance(error, EngineRefused):
            raise
        progress.say(f"{error}; building it again")
        cache.remove(engine.key)
    return load(build())


class TensorRtSession:
    """A step graph loaded on the GPU. It owns its stream, its memory, its recordings and the engine.

    Args:
        flavour: The library.
        plan: The serialized engine.
        cuda: The CUDA functions.
        gpu: The GPU, for ``describe``.
        graph_sha256: Hash of the graph that the engine was built from.
        cuda_graphs: Whether steps are recorded and replayed.
        kept_batch_sizes: Recordings that live at once, the last ones used; each has an execution context, and all share
            one scratch memory. TensorRT-RTX keeps its own.

    Raises:
        EngineRefused: The engine cannot be loaded.
        EngineError: CUDA answers with an error.
        BundleError: It is not the engine of a step graph.
        EnvironmentProblem: There is no usable GPU.
        ResourceProblem: The GPU's memory ran out.
    """

    def __init__(
        self,
        flavour: Flavour,
        plan: Path,
        cuda: CudaRuntime,
        *,
        gpu: Gpu,
        graph_sha256: str,
        cuda_graphs: bool = True,
        kept_batch_sizes: int = KEPT_BATCH_SIZES,
    ) -> None:
        self._flavour = flavour
        self._gpu = gpu
        self._graph_sha256 = graph_sha256
        self._cuda = cuda
        self._cuda_graphs = cuda_graphs
        with ExitStack() as stack:
            self._stream = cuda.new_stream()
            stack.callback(cuda.destroy_stream, self._stream)
            self._engine = StepEngine(flavour, plan, cuda, cuda_graphs=cuda_graphs)
            stack.callback(self._engine.close)
            self.interface, largest = self._engine.interface, self._engine.profile.max
            specs, results = self.interface.inputs, self.interface.outputs
            each_step = [self.interface[name] for name in _EACH_STEP]
            self._device = DeviceTensors(cuda, stack, (*specs, *results), largest, self._stream)
            self._given = Staging(cuda, stack, specs, largest)
            self._results = Staging(cuda, stack, results, largest)
            self._ring = StagingRing(cuda, stack, each_step, largest)
            self._graphs: StepGraphs | None = None
            if cuda_graphs and not flavour.records_graphs:
                self._graphs = StepGraphs(cuda, self._stream, kept_batch_sizes)
                stack.callback(self._graphs.close)
            stack.callback(cuda.synchronize, self._stream)
            self._owned = stack.pop_all()
        self._closed = False

    @property
    def max_batch(self) -> int | None:
        """The largest batch of the engine's profile."""
        return self._engine.profile.max

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> StepOutput:
        """Run one step; ``StepSession.run`` says what it takes and raises. The result is in the session's memory.

        Raises:
            EngineError: The library or CUDA refuses.
        """
        rows = self._checked(inputs)
        self._given.upload(inputs, self._device, self._stream)
        self._step(rows)
        return self._fetched(rows)

    def run_steps(self, inputs: Mapping[str, NDArray[Any]], steps: Iterable[StepInputs]) -> StepOutput:
        """Run a loop of steps on the device; ``StepLoop.run_steps`` says what it takes and raises.

        Raises:
            EngineError: The library or CUDA refuses.
        """
        rows = self._checked(inputs)
        self._given.upload(inputs, self._device, self._stream)
        count = 0
        for step in steps:
            values = {name: value for name in _EACH_STEP if (value := getattr(step, name)) is not None}
            for name, value in values.items():
                check_tensor(self.interface[name], value, rows, f" of step {count}")
            self._ring.upload(values, self._device, self._stream)
            self._step(rows)
            count += 1
        if not count:
            raise InputError("the loop has no steps; give at least one")
        return self._fetched(rows)

    def describe(self) -> dict[str, object]:
        """Backend, version, GPU, batch profile, who makes CUDA graphs or why there are none, hash of the graph."""
        recorded_by = self._flavour.backend if self._flavour.records_graphs else "qdm-deploy"
        if self._graphs is not None and self._graphs.refusal is not None:
            recorded_by = f"refused: {self._graphs.refusal}"
        return {
            "backend": self._flavour.backend,
            "version": self._engine.version,
            "device": self._gpu.name,
            "compute_capability": self._gpu.capability,
            "driver": self._gpu.driver,
            "precision": "the graph's own (strongly typed)",
            "profile": str(self._engine.profile),
            "cuda_graphs": recorded_by if self._cuda_graphs else "off",
            "graph_sha256": self._graph_sha256,
        }

    def close(self) -> None:
        """Wait for the GPU and give everything back."""
        self._closed = True
        self._owned.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _checked(self, inputs: Mapping[str, NDArray[Any]]) -> int:
        if self._closed:
            raise ValueError("this TensorRtSession is closed")
        profile = self._engine.profile
        rows = check_inputs(self.interface, inputs, profile.max)
        if rows < profile.min:
            raise InputError(f"sample has {rows} rows; the engine was built for batches of {profile.min} or more")
        return rows

    def _step(self, rows: int) -> None:
        def queue() -> None:
            self._engine.queue(rows, self._device.address, self._stream)
            for to, source in self.interface.feedback:
                size = rows * row_bytes(self.interface[to])
                self._cuda.copy(self._device.address[to], self._device.address[source], size, self._stream)

        if self._graphs is None:
            queue()
            return
        self._graphs.run(rows, queue)
        self._engine.keep_only(self._graphs.batch_sizes)

    def _fetched(self, rows: int) -> StepOutput:
        results = self._results.download(self._device, rows, self._stream)
        self._cuda.synchronize(self._stream)
        return StepOutput(**results)
