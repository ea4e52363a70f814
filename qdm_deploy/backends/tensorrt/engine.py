"""A plan loaded by TensorRT or TensorRT-RTX: its inputs, its outputs, its batch sizes, and how a step is queued.

Ownership is explicit: the runtime, the engine and each execution context are references of this object and are dropped
by ``close``, contexts first. TensorRT gets one context per batch size, because a recorded graph holds its context's
state; all of them share one block of scratch memory, since steps run one after another on one stream. TensorRT-RTX
compiles kernels for a shape when it meets it and records its own graphs, so it gets one context and is told to. It also
waits for these kernels: by default it would run others until they are there, and one seed could give two pictures.

Source: TensorRT and TensorRT-RTX Python API (ICudaEngine, IExecutionContext, IRuntimeConfig); NvInferRuntime.h.
"""

import re
from pathlib import Path
from typing import Any

from qdm_deploy.artifacts.step_interface import DType, StepInterface
from qdm_deploy.backends.tensorrt.cuda import CudaRuntime
from qdm_deploy.engines.flavour import Flavour
from qdm_deploy.engines.request import BatchProfile
from qdm_deploy.errors import BundleError, EngineError, EngineRefused, ResourceProblem
from qdm_deploy.runtime.session import interface_of_graph

__all__ = ["StepEngine"]

_DTYPES: dict[str, DType] = {"FLOAT": "float32", "INT64": "int64"}
_PROFILE = 0
_OUT_OF_MEMORY = re.compile(r"out of ?memory|MemoryAllocation", re.IGNORECASE)


class StepEngine:
    """A loaded step graph engine.

    Args:
        flavour: The library.
        plan: The serialized engine.
        cuda: The CUDA functions.
        cuda_graphs: Whether steps are recorded: by the caller, or by TensorRT-RTX itself.

    Raises:
        EngineRefused: The library cannot load it: built by another version, for another GPU, or damaged.
        EngineError: The library does not start.
        ResourceProblem: The GPU's memory ran out.
        BundleError: It is not the engine of a step graph.
    """

    def __init__(self, flavour: Flavour, plan: Path, cuda: CudaRuntime, *, cuda_graphs: bool = True) -> None:
        self._flavour = flavour
        self._library = flavour.load()
        self._cuda = cuda
        self._cuda_graphs = cuda_graphs
        # A recording holds its context's state; without recordings of ours one context is set to each size in turn.
        self._context_per_size = cuda_graphs and not flavour.records_graphs
        self._logger = _logger(self._library)
        self._scratch = 0
        self._contexts: dict[int, Any] = {}
        self._rows: dict[int, int] = {}  # what each context is set to
        try:
            self._runtime: Any = self._library.Runtime(self._logger)
        except TypeError as error:  # what the binding raises when the native constructor returns null
            raise self._refusal("start") from error
        self._engine: Any = self._runtime.deserialize_cuda_engine(plan.read_bytes())
        if self._engine is None:
            raise self._refusal(f"load the engine {plan}", EngineRefused)
        self.interface, self.profile = self._described(plan)

    @property
    def version(self) -> str:
        """Version of the library."""
        return str(self._library.__version__)

    def queue(self, rows: int, addresses: dict[str, int], stream: int) -> None:
        """Queue the engine's work for ``rows`` rows; ``addresses`` are those of every input and output.

        Raises:
            EngineError: The library refuses, with what it logged.
        """
        context = self._context(rows, addresses, stream)
        if not context.execute_async_v3(stream):
            raise self._refusal(f"run a step of {rows} rows")

    def keep_only(self, batch_sizes: tuple[int, ...]) -> None:
        """Drop the contexts of other batch sizes; the caller has waited for their work."""
        if self._context_per_size:
            for rows in set(self._contexts).difference(batch_sizes):
                del self._contexts[rows]

    def close(self) -> None:
        """Drop contexts, engine, runtime and scratch memory, in that order. The stream must be idle."""
        self._contexts.clear()
        self._engine = None
        self._runtime = None
        if self._scratch:
            scratch, self._scratch = self._scratch, 0
            self._cuda.free(scratch)

    def _context(self, rows: int, addresses: dict[str, int], stream: int) -> Any:
        key = rows if self._context_per_size else 0
        known = self._contexts.get(key)
        if known is not None and self._rows.get(key) == rows:
            return known
        context = self._new_context(stream) if known is None else known
        if known is None:
            for name, address in addresses.items():
                if not context.set_tensor_address(name, address):
                    raise self._refusal(f"take the address of {name}")
        self._rows.pop(key, None)  # set to nothing in particular until every input has its shape
        for spec in self.interface:
            if not context.set_input_shape(spec.name, (rows, *spec.row_shape)):
                raise self._refusal(f"take {rows} rows of {spec.name}")
        try:
            missing = context.infer_shapes()
        except RuntimeError as error:
            raise self._refusal(f"infer the shapes of a step of {rows} rows") from error
        if missing:
            raise self._refusal(f"infer shapes without {', '.join(missing)}")
        self._contexts[key], self._rows[key] = context, rows
        return context

    def _new_context(self, stream: int) -> Any:
        if self._flavour.records_graphs:
            config = self._engine.create_runtime_config()
            strategies = self._library.CudaGraphStrategy
            config.cuda_graph_strategy = strategies.WHOLE_GRAPH_CAPTURE if self._cuda_graphs else strategies.DISABLED
            config.dynamic_shapes_kernel_specialization_strategy = (
                self._library.DynamicShapesKernelSpecializationStrategy.EAGER
            )
            context = self._engine.create_execution_context(config)
        else:
            strategy = self._library.ExecutionContextAllocationStrategy.USER_MANAGED
            context = self._engine.create_execution_context(strategy)
        if context is None:
            raise self._refusal("make an execution context")
        if not self._flavour.records_graphs:
            size = int(self._engine.device_memory_size_v2)
            if size and not self._scratch:
                self._scratch = self._cuda.allocate(size)
            if size:
                context.set_device_memory(self._scratch, size)
        if not context.set_optimization_profile_async(_PROFILE, stream):
            raise self._refusal("set its optimization profile")
        # Setting the profile may queue copies; the first shapes are set by the host, so they must be done.
        self._cuda.synchronize(stream)
        return context

    def _refusal(self, what: str, kind: type[EngineError] = EngineError) -> EngineError | ResourceProblem:
        reasons = "; ".join(self._logger.errors[-3:]) or "no reason given"
        if _OUT_OF_MEMORY.search(reasons):  # says nothing against the engine
            return ResourceProblem(
                f"{self._flavour.backend} {self.version} cannot {what}: the GPU's memory ran out ({reasons}); end what "
                "else runs on it, or serve smaller batches"
            )
        return kind(
            f"{self._flavour.backend} {self.version} cannot {what}: {reasons}. See docs/troubleshooting.md; the CPU "
            "backends run the same bundle"
        )

    def _described(self, plan: Path) -> tuple[StepInterface, BatchProfile]:
        engine, library = self._engine, self._library
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        on_host = [name for name in names if engine.get_tensor_location(name) != library.TensorLocation.DEVICE]
        if on_host:
            raise BundleError(
                f"the engine {plan} reads {', '.join(on_host)} on the host, as a shape; a step graph has no such "
                "input. Build the bundle again with this version."
            )
        described: dict[str, tuple[str, DType | None, list[int | None]]] = {
            name: (
                name,
                _DTYPES.get(engine.get_tensor_dtype(name).name),
                [None if size < 0 else int(size) for size in engine.get_tensor_shape(name)],
            )
            for name in names
        }
        is_input = {name: engine.get_tensor_mode(name) == library.TensorIOMode.INPUT for name in names}
        interface = interface_of_graph(
            plan,
            [described[name] for name in names if is_input[name]],
            [described[name] for name in names if not is_input[name]],
        )
        low, best, high = (int(shape[0]) for shape in engine.get_tensor_profile_shape("sample", _PROFILE))
        return interface, BatchProfile(low, best, high)


def _logger(library: Any) -> Any:
    class Log(library.ILogger):  # type: ignore[misc]  # the base class comes from an untyped native module
        """Keeps the errors; the rest is noise in a program that runs."""

        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity.name in ("ERROR", "INTERNAL_ERROR"):
                self.errors.append(message)

    return Log()
