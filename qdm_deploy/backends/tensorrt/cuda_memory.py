"""Buffers of a step session: where each tensor lives on the GPU, and the page-locked memory beside it.

Device buffers have one address for the whole life of a session, because captured graphs hold it. Each is as large as
the largest batch needs; a smaller batch uses its first rows.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.artifacts.step_interface import TensorSpec
from qdm_deploy.backends.tensorrt.cuda import CudaRuntime, array_at

__all__ = ["DeviceTensors", "Staging", "StagingRing", "row_bytes"]

_ALIGNMENT = 256  # what cudaMalloc gives; the tensors of one block keep it


def row_bytes(spec: TensorSpec) -> int:
    """Bytes of one row of a tensor."""
    return math.prod(spec.row_shape) * spec.numpy_dtype.itemsize


class DeviceTensors:
    """One block of device memory with every tensor of a step in it, zeroed.

    Args:
        cuda: The CUDA functions.
        stack: Frees the block when it closes.
        specs: The tensors.
        rows: Rows of the largest batch.
        stream: Where the zeros are queued.
    """

    def __init__(
        self, cuda: CudaRuntime, stack: ExitStack, specs: Sequence[TensorSpec], rows: int, stream: int
    ) -> None:
        offsets, size = _layout(specs, rows)
        block = cuda.allocate(size)
        stack.callback(cuda.free, block)
        cuda.clear(block, size, stream)  # whatever a tensor that no step has filled yet holds, it is finite
        self.address = {name: block + offset for name, offset in offsets.items()}


class Staging:
    """Page-locked host memory for some tensors, filled by the host and copied to the device without waiting.

    Args:
        cuda: The CUDA functions.
        stack: Frees the block when it closes.
        specs: The tensors.
        rows: Rows of the largest batch.
    """

    def __init__(self, cuda: CudaRuntime, stack: ExitStack, specs: Sequence[TensorSpec], rows: int) -> None:
        self._cuda = cuda
        self._specs = {spec.name: spec for spec in specs}
        offsets, size = _layout(specs, rows)
        block = cuda.allocate_pinned(size)
        stack.callback(cuda.free_pinned, block)
        self._address = {name: block + offset for name, offset in offsets.items()}
        self._array = {
            spec.name: array_at(self._address[spec.name], spec.numpy_dtype, (rows, *spec.row_shape)) for spec in specs
        }

    def upload(self, values: Mapping[str, NDArray[Any]], device: DeviceTensors, stream: int) -> None:
        """Take the values over and queue their copies; the caller's arrays are free when this returns."""
        for name, value in values.items():
            rows = len(value)
            np.copyto(self._array[name][:rows], value)
            size = rows * row_bytes(self._specs[name])
            self._cuda.upload(device.address[name], self._address[name], size, stream)

    def download(self, device: DeviceTensors, rows: int, stream: int) -> dict[str, NDArray[Any]]:
        """Queue copies of every tensor's first rows to the host; the arrays hold them once the stream got there."""
        for name, spec in self._specs.items():
            self._cuda.download(self._address[name], device.address[name], rows * row_bytes(spec), stream)
        return {name: array[:rows] for name, array in self._array.items()}


class StagingRing:
    """Staging for several steps at once, so that the host prepares steps ahead while the GPU works.

    A slot is filled again when its copy of ``depth`` steps ago is done: the host waits for that copy at most, never for
    the step it has just queued.

    Args:
        cuda: The CUDA functions.
        stack: Frees everything when it closes.
        specs: The tensors.
        rows: Rows of the largest batch.
        depth: Slots.
    """

    def __init__(
        self, cuda: CudaRuntime, stack: ExitStack, specs: Sequence[TensorSpec], rows: int, depth: int = 4
    ) -> None:
        self._cuda = cuda
        self._slots = [Staging(cuda, stack, specs, rows) for _ in range(depth)]
        self._events = []
        for _ in range(depth):
            event = cuda.new_event()
            stack.callback(cuda.destroy_event, event)
            self._events.append(event)
        self._used = 0

    def upload(self, values: Mapping[str, NDArray[Any]], device: DeviceTensors, stream: int) -> None:
        """As ``Staging.upload``, through the next slot."""
        slot = self._used % len(self._slots)
        if self._used >= len(self._slots):
            self._cuda.wait_for(self._events[slot])
        self._slots[slot].upload(values, device, stream)
        self._cuda.record(self._events[slot], stream)
        self._used += 1


def _layout(specs: Sequence[TensorSpec], rows: int) -> tuple[dict[str, int], int]:
    """Offset of each tensor in one block, and the block's size in bytes."""
    offsets, size = {}, 0
    for spec in specs:
        offsets[spec.name] = size
        size += -(-rows * row_bytes(spec) // _ALIGNMENT) * _ALIGNMENT
    return offsets, size
