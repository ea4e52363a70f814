"""A GPU that is not there: the CUDA functions on host memory, and a TensorRT module that computes with ONNX Runtime.

The device runs nothing when it is queued: its stream is a list that runs when somebody waits. So memory that is filled
again too early, a copy in the wrong order, or a result read without waiting gives wrong numbers as it would on a GPU.
"""

import ctypes
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from qdm_deploy.backends.onnxruntime.session import OnnxRuntimeSession
from qdm_deploy.backends.tensorrt.cuda import CudaRuntime, array_at
from qdm_deploy.errors import EngineError

Queued = Callable[[], None]


class LateDevice(CudaRuntime):
    """Runs what is queued when somebody waits; counts and checks everything that is handed out."""

    def __init__(self) -> None:
        self.blocks: dict[int, Any] = {}
        self.pinned: set[int] = set()
        self.stream: list[Queued] = []
        self.captured: list[Queued] | None = None
        self.graphs: dict[int, list[Queued]] = {}
        self.events: dict[int, int] = {}
        self.streams: set[int] = set()
        self.calls: list[str] = []
        self.refuse_capture = False
        self._handles = iter(range(1, 10_000))
        self.done = 0  # operations run since the stream was made

    def _block(self, size: int) -> int:
        memory = (ctypes.c_char * size).from_buffer(bytearray(b"\xff" * size))  # NaN, so that nothing passes for zero
        self.blocks[ctypes.addressof(memory)] = memory
        return ctypes.addressof(memory)

    def queue(self, what: Queued) -> None:
        (self.stream if self.captured is None else self.captured).append(what)

    def _run(self, count: int) -> None:
        assert self.captured is None, "nothing may wait while a graph is recorded"
        for what in self.stream[:count]:
            what()
        del self.stream[:count]
        self.done += count

    def allocate(self, size: int) -> int:
        return self._block(size)

    def free(self, pointer: int) -> None:
        assert not self.stream, "memory was freed while work that uses it was queued"
        del self.blocks[pointer]

    def allocate_pinned(self, size: int) -> int:
        pointer = self._block(size)
        self.pinned.add(pointer)
        return pointer

    def free_pinned(self, pointer: int) -> None:
        self.pinned.remove(pointer)
        self.free(pointer)

    def new_stream(self) -> int:
        self.streams.add(handle := next(self._handles))
        return handle

    def destroy_stream(self, stream: int) -> None:
        self.streams.remove(stream)

    def synchronize(self, stream: int) -> None:
        self.calls.append("synchronize")
        self._run(len(self.stream))

    def new_event(self) -> int:
        self.events[event := next(self._handles)] = 0
        return event

    def destroy_event(self, event: int) -> None:
        del self.events[event]

    def record(self, event: int, stream: int) -> None:
        self.events[event] = self.done + len(self.stream)

    def wait_for(self, event: int) -> None:
        self.calls.append("wait")
        self._run(max(self.events[event] - self.done, 0))

    def clear(self, device: int, size: int, stream: int) -> None:
        self.queue(lambda: ctypes.memset(device, 0, size) and None)

    def upload(self, device: int, host: int, size: int, stream: int) -> None:
        self.calls.append("upload")
        self._copy(device, host, size)

    def download(self, host: int, device: int, size: int, stream: int) -> None:
        self.calls.append("download")
        self._copy(host, device, size)

    def copy(self, to: int, source: int, size: int, stream: int) -> None:
        self._copy(to, source, size)

    def _copy(self, to: int, source: int, size: int) -> None:
        self.queue(lambda: ctypes.memmove(to, source, size) and None)

    def begin_capture(self, stream: int) -> None:
        assert not self.stream, "deferred work must be done before a graph is recorded"
        self.captured = []

    def end_capture(self, stream: int) -> int:
        assert self.captured is not None
        recorded, self.captured = self.captured, None
        if self.refuse_capture:
            raise EngineError("cudaStreamEndCapture answers 'invalidated'")
        self.graphs[graph := next(self._handles)] = recorded
        self.calls.append("record")
        return graph

    def launch(self, graph: int, stream: int) -> None:
        self.calls.append("launch")
        self.stream.extend(self.graphs[graph])

    def destroy_graph(self, graph: int) -> None:
        del self.graphs[graph]


class Context:
    """An execution context: shapes, addresses, and work that reads and writes at those addresses."""

    def __init__(self, library: "Library") -> None:
        self.library = library
        self.address: dict[str, int] = {}
        self.shape: dict[str, tuple[int, ...]] = {}
        library.contexts.append(self)

    def set_device_memory(self, address: int, size: int) -> None:
        assert size == 1000
        self.library.scratch.add(address)

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        return index == 0

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.address[name] = address
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shape[name] = shape
        return True

    def infer_shapes(self) -> list[str]:
        return [name for name in self.library.session.interface.input_names if name not in self.shape]

    def execute_async_v3(self, stream: int) -> bool:
        if self.library.broken:
            self.library.logger.log(SimpleNamespace(name="ERROR"), "the engine is broken")
            return False
        shape, library = dict(self.shape), self.library

        def compute() -> None:
            types = {spec.name: spec.numpy_dtype for spec in library.session.interface}
            arrays = {name: array_at(self.address[name], types[name], shape[name]) for name in shape}
            result = library.session.run({name: array.copy() for name, array in arrays.items()})
            for name in library.session.interface.output_names:
                values = np.ascontiguousarray(getattr(result, name))
                ctypes.memmove(self.address[name], values.ctypes.data, values.nbytes)

        library.device.queue(compute)
        return True


class Library:
    """The part of the tensorrt module that a session uses, for one step graph."""

    __version__ = "11.1.0"
    ILogger = object
    TensorLocation = SimpleNamespace(DEVICE="device")
    TensorIOMode = SimpleNamespace(INPUT="in")
    CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole", DISABLED="off")
    DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager")
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user")
    device_memory_size_v2 = 1000

    def __init__(self, graph: Path, device: LateDevice) -> None:
        self.session = OnnxRuntimeSession(graph, threads=1)
        self.device = device
        self.contexts: list[Context] = []
        self.scratch: set[int] = set()
        self.strategies: list[str] = []
        self.specializations: list[str | None] = []
        self.broken = False
        interface = self.session.interface
        self.specs = {spec.name: spec for spec in (*interface.inputs, *interface.outputs)}
        self.names = list(self.specs)
        self.num_io_tensors = len(self.names)

    def Runtime(self, logger: Any) -> Any:  # noqa: N802
        self.logger = logger
        return SimpleNamespace(deserialize_cuda_engine=self.load)

    def load(self, plan: bytes) -> Any:
        if plan != b"good plan":
            why = "[defaultAllocator.cpp::allocateAsync] Error Code 1: Cuda Runtime (out of memory)"
            why = why if plan == b"too large" else "magicTag does not match"
            self.logger.log(SimpleNamespace(name="ERROR"), why)
            return None
        return self

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_location(self, name: str) -> str:
        return "device"

    def get_tensor_mode(self, name: str) -> str:
        return "in" if name in self.session.interface.input_names else "out"

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name="INT64" if self.specs[name].dtype == "int64" else "FLOAT")

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, *self.specs[name].row_shape)

    def get_tensor_profile_shape(self, name: str, index: int) -> list[tuple[int, ...]]:
        return [(size, 3, 4, 4) for size in (1, 4, 6)]

    def create_runtime_config(self) -> Any:
        return SimpleNamespace(cuda_graph_strategy=None, dynamic_shapes_kernel_specialization_strategy="lazy")

    def create_execution_context(self, how: Any) -> Context:
        self.strategies.append(getattr(how, "cuda_graph_strategy", how))
        self.specializations.append(getattr(how, "dynamic_shapes_kernel_specialization_strategy", None))
        return Context(self)
