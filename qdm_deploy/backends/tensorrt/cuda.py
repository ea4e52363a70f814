"""The few CUDA runtime functions that a session needs, each with plain integers for pointers and handles.

``CudaRuntime`` calls ``cuda.bindings.runtime`` (NVIDIA's own binding; no torch, no pycuda) and is the only place that
does, so a test can put a device that lives in host memory in its place. Nothing here waits for the GPU unless it is
called ``synchronize`` or ``wait_for``.

Source: CUDA Runtime API (memory management, stream management, graph management); names are those of the C functions.
"""

import ctypes
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.errors import EngineError, EnvironmentProblem, ResourceProblem

__all__ = ["CudaRuntime", "array_at"]


class CudaRuntime:
    """Memory, streams, events and graphs of the first visible GPU. Pointers and handles are integers.

    Every function raises ``EnvironmentProblem`` where driver or GPU are missing, ``ResourceProblem`` where memory ran
    out, and ``EngineError`` for every other answer of CUDA.

    Raises:
        EnvironmentProblem: The package cuda-bindings is missing.
    """

    def __init__(self) -> None:
        try:
            from cuda.bindings import runtime
        except ImportError as error:
            raise EnvironmentProblem(
                f"the TensorRT backends need the package cuda-bindings, which cannot be imported here ({error}); "
                "install it with: pip install 'cuda-bindings>=13,<14'"
            ) from error
        self._cuda: Any = runtime

    def allocate(self, size: int) -> int:
        """Device memory, ``size`` bytes (``cudaMalloc``)."""
        return self._int("cudaMalloc", size)

    def free(self, pointer: int) -> None:
        """Give device memory back (``cudaFree``)."""
        self._call("cudaFree", pointer)

    def allocate_pinned(self, size: int) -> int:
        """Page-locked host memory, the only kind that is copied without the host waiting (``cudaHostAlloc``)."""
        return self._int("cudaHostAlloc", size, self._cuda.cudaHostAllocDefault)

    def free_pinned(self, pointer: int) -> None:
        """Give page-locked memory back (``cudaFreeHost``)."""
        self._call("cudaFreeHost", pointer)

    def new_stream(self) -> int:
        """A stream that does not wait for the default stream (``cudaStreamCreateWithFlags``)."""
        return self._int("cudaStreamCreateWithFlags", self._cuda.cudaStreamNonBlocking)

    def destroy_stream(self, stream: int) -> None:
        """``cudaStreamDestroy``."""
        self._call("cudaStreamDestroy", stream)

    def synchronize(self, stream: int) -> None:
        """Wait until everything queued on the stream is done (``cudaStreamSynchronize``)."""
        self._call("cudaStreamSynchronize", stream)

    def new_event(self) -> int:
        """An event that carries no time (``cudaEventCreateWithFlags``)."""
        return self._int("cudaEventCreateWithFlags", self._cuda.cudaEventDisableTiming)

    def destroy_event(self, event: int) -> None:
        """``cudaEventDestroy``."""
        self._call("cudaEventDestroy", event)

    def record(self, event: int, stream: int) -> None:
        """Mark this point of the stream (``cudaEventRecord``)."""
        self._call("cudaEventRecord", event, stream)

    def wait_for(self, event: int) -> None:
        """Wait until the stream has passed the event's mark (``cudaEventSynchronize``)."""
        self._call("cudaEventSynchronize", event)

    def clear(self, device: int, size: int, stream: int) -> None:
        """Queue zeros into device memory (``cudaMemsetAsync``)."""
        self._call("cudaMemsetAsync", device, 0, size, stream)

    def upload(self, device: int, host: int, size: int, stream: int) -> None:
        """Queue a copy from page-locked memory (``cudaMemcpyAsync``)."""
        self._copy(device, host, size, "cudaMemcpyHostToDevice", stream)

    def download(self, host: int, device: int, size: int, stream: int) -> None:
        """Queue a copy to page-locked memory (``cudaMemcpyAsync``)."""
        self._copy(host, device, size, "cudaMemcpyDeviceToHost", stream)

    def copy(self, to: int, source: int, size: int, stream: int) -> None:
        """Queue a copy within the device (``cudaMemcpyAsync``)."""
        self._copy(to, source, size, "cudaMemcpyDeviceToDevice", stream)

    def begin_capture(self, stream: int) -> None:
        """What this thread queues on the stream from here on is recorded, not run (``cudaStreamBeginCapture``)."""
        # Of this thread only: other threads of the process may allocate meanwhile.
        self._call("cudaStreamBeginCapture", stream, self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)

    def end_capture(self, stream: int) -> int:
        """The recording, ready to run (``cudaStreamEndCapture``, ``cudaGraphInstantiate``)."""
        template = self._int("cudaStreamEndCapture", stream)
        try:
            return self._int("cudaGraphInstantiate", template, 0)
        finally:
            self._call("cudaGraphDestroy", template)

    def launch(self, graph: int, stream: int) -> None:
        """Queue a recording (``cudaGraphLaunch``)."""
        self._call("cudaGraphLaunch", graph, stream)

    def destroy_graph(self, graph: int) -> None:
        """``cudaGraphExecDestroy``."""
        self._call("cudaGraphExecDestroy", graph)

    def _copy(self, to: int, source: int, size: int, kind: str, stream: int) -> None:
        self._call("cudaMemcpyAsync", to, source, size, getattr(self._cuda.cudaMemcpyKind, kind), stream)

    def _int(self, function: str, *arguments: Any) -> int:
        return int(self._call(function, *arguments)[0])

    def _call(self, function: str, *arguments: Any) -> tuple[Any, ...]:
        code, *values = getattr(self._cuda, function)(*arguments)
        if code != self._cuda.cudaError_t.cudaSuccess:
            self._fail(function, code)
        return tuple(values)

    def _fail(self, function: str, code: Any) -> NoReturn:
        _, text = self._cuda.cudaGetErrorString(code)
        reason = f"{text.decode('utf-8', 'replace')} ({code.name}, CUDA error {int(code)})"
        errors = self._cuda.cudaError_t
        if code in (errors.cudaErrorInsufficientDriver, errors.cudaErrorNoDevice, errors.cudaErrorInitializationError):
            raise EnvironmentProblem(
                f"there is no GPU that this process can use: {function} answers '{reason}'; check nvidia-smi and "
                "CUDA_VISIBLE_DEVICES (in a container: --gpus all), or use the backends onnxruntime or openvino"
            )
        if code == errors.cudaErrorMemoryAllocation:
            raise ResourceProblem(
                f"the GPU's or the page-locked memory ran out: {function} answers '{reason}'; run smaller batches, "
                "build the engine with a smaller largest batch, or end other processes on the GPU"
            )
        raise EngineError(
            f"{function} answers '{reason}'; the GPU's state is unknown now, so start the process again. If it comes "
            "back, run with CUDA_LAUNCH_BLOCKING=1 and see docs/troubleshooting.md"
        )


def array_at(pointer: int, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """A numpy view of host memory that somebody else owns and must outlive it."""
    size = int(np.prod(shape)) * dtype.itemsize
    memory = memoryview((ctypes.c_char * size).from_address(pointer))
    return np.frombuffer(memory, dtype).reshape(shape)
