"""The CUDA functions as they answer without a driver: the real binding, every call, its real error.

That each call gets as far as CUDA's own answer shows that names and argument types are right. What the calls do needs a
GPU: test_tensorrt_gpu.py.
"""

import inspect
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qdm_deploy.backends.tensorrt.cuda import CudaRuntime, array_at
from qdm_deploy.errors import EngineError, EnvironmentProblem, ResourceProblem

HAS_DRIVER = Path("/proc/driver/nvidia/version").exists()
runtime = pytest.importorskip("cuda.bindings.runtime", reason="calls the real binding: needs the package cuda-bindings")

CALLS: dict[str, Callable[[CudaRuntime], object]] = {
    "allocate": lambda cuda: cuda.allocate(16),
    "allocate_pinned": lambda cuda: cuda.allocate_pinned(16),
    "new_stream": lambda cuda: cuda.new_stream(),
    "destroy_stream": lambda cuda: cuda.destroy_stream(8),
    "synchronize": lambda cuda: cuda.synchronize(8),
    "new_event": lambda cuda: cuda.new_event(),
    "destroy_event": lambda cuda: cuda.destroy_event(8),
    "record": lambda cuda: cuda.record(8, 8),
    "wait_for": lambda cuda: cuda.wait_for(8),
    "clear": lambda cuda: cuda.clear(8, 16, 8),
    "upload": lambda cuda: cuda.upload(8, 16, 4, 8),
    "download": lambda cuda: cuda.download(8, 16, 4, 8),
    "copy": lambda cuda: cuda.copy(8, 16, 4, 8),
    "begin_capture": lambda cuda: cuda.begin_capture(8),
    "end_capture": lambda cuda: cuda.end_capture(8),
    "launch": lambda cuda: cuda.launch(8, 8),
    "free": lambda cuda: cuda.free(8),
    "free_pinned": lambda cuda: cuda.free_pinned(8),
    "destroy_graph": lambda cuda: cuda.destroy_graph(8),
}


def test_every_function_is_tried_here() -> None:
    assert set(CALLS) == {name for name, _ in inspect.getmembers(CudaRuntime, inspect.isfunction) if name[0] != "_"}


@pytest.mark.skipif(HAS_DRIVER, reason="a GPU is here, and the arguments above are not its own")
@pytest.mark.parametrize("name", CALLS)
def test_without_a_driver_every_call_says_so(name: str) -> None:
    with pytest.raises(
        EnvironmentProblem, match=r"no GPU that this process can use: cuda\w+ answers '.*CUDA error 35\)'; check nvidia"
    ):
        CALLS[name](CudaRuntime())


@pytest.mark.parametrize(
    ("code", "kind", "said"),
    [
        ("cudaErrorMemoryAllocation", ResourceProblem, "ran out: cudaMalloc answers 'out of memory"),
        (
            "cudaErrorIllegalAddress",
            EngineError,
            r"cudaMalloc answers 'an illegal memory access.*start the process again",
        ),
        ("cudaErrorNoDevice", EnvironmentProblem, "no GPU that this process can use"),
    ],
)
def test_errors_of_cuda_become_ours(
    monkeypatch: pytest.MonkeyPatch, code: str, kind: type[Exception], said: str
) -> None:
    monkeypatch.setattr(runtime, "cudaMalloc", lambda size: (getattr(runtime.cudaError_t, code), None))
    with pytest.raises(kind, match=said):
        CudaRuntime().allocate(16)


def test_values_are_plain_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = type("Handle", (), {"__int__": lambda self: 77})()
    monkeypatch.setattr(runtime, "cudaStreamCreateWithFlags", lambda flags: (runtime.cudaError_t.cudaSuccess, stream))
    assert CudaRuntime().new_stream() == 77


def test_a_view_shares_the_memory_it_is_of() -> None:
    memory = np.arange(6, dtype=np.int64)
    view = array_at(memory.ctypes.data, memory.dtype, (2, 3))
    np.testing.assert_array_equal(view, [[0, 1, 2], [3, 4, 5]])
    view[1, 2] = 9
    assert memory[5] == 9
