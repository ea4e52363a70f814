"""What only a GPU can show; skipped with what it would have shown.

Run with ``pytest -m gpu`` on a machine with an NVIDIA GPU and TensorRT or TensorRT-RTX. ``benchmarks/gpu_suite.py``
measures there; these tests judge.
"""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qdm_deploy.backends.onnxruntime.session import OnnxRuntimeSession
from qdm_deploy.backends.tensorrt.cuda import CudaRuntime, array_at
from qdm_deploy.backends.tensorrt.session import TensorRtSession, open_tensorrt
from qdm_deploy.engines.cache import EngineCache
from qdm_deploy.engines.flavour import FLAVOURS
from qdm_deploy.engines.gpu import installed_gpu
from qdm_deploy.engines.request import BatchProfile
from qdm_deploy.runtime.denoise import denoise


@pytest.fixture(params=sorted(FLAVOURS))
def opened(request: pytest.FixtureRequest, labelled: Any, tmp_path: Path) -> Iterator[TensorRtSession]:
    flavour = FLAVOURS[request.param]
    capability = installed_gpu(flavour.backend).capability
    if importlib.util.find_spec(flavour.module) is None:
        pytest.skip(f"{flavour.module} is not installed; would have shown that sessions on {flavour.backend} work")
    if flavour.capabilities and capability not in flavour.capabilities:
        pytest.skip(f"{flavour.backend} does not build for compute capability {capability}")
    with open_tensorrt(
        labelled.graph, flavour.backend, profile=BatchProfile(1, 2, 6), cache=EngineCache(tmp_path / "cache")
    ) as session:
        yield session


@pytest.mark.gpu("a step graph answers on the GPU as it does on ONNX Runtime, step by step and as a recorded loop")
def test_a_guided_loop_gives_the_samples_of_onnx_runtime(
    opened: TensorRtSession, labelled: Any, make_table: Any
) -> None:
    table, seeds = make_table("ddpm", 12), range(8)
    sampling, how = labelled.sampling(table, seeds, np.arange(8) % 5, guidance=3.0), {"batch_size": 3}
    with OnnxRuntimeSession(labelled.graph, threads=1) as reference:
        expected = denoise(reference, sampling, **how)
    for _ in range(2):  # the second run replays what the first recorded
        found = denoise(opened, sampling, **how)
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-3)
    stepwise = denoise(opened, sampling, on_step=lambda step, samples: None, **how)
    np.testing.assert_array_equal(stepwise, found)


@pytest.mark.gpu("memory, copies, events and recorded graphs behave as the session's other tests assume")
def test_copies_and_recordings_do_what_they_say() -> None:
    cuda = CudaRuntime()
    stream, event = cuda.new_stream(), cuda.new_event()
    host, device, other = cuda.allocate_pinned(64), cuda.allocate(64), cuda.allocate(64)
    values = array_at(host, np.dtype(np.float32), (16,))
    values[:] = np.arange(16)
    cuda.clear(other, 64, stream)
    cuda.upload(device, host, 64, stream)
    cuda.record(event, stream)
    cuda.wait_for(event)
    values[:] = -1
    cuda.synchronize(stream)
    cuda.begin_capture(stream)
    cuda.copy(other, device, 64, stream)
    graph = cuda.end_capture(stream)
    cuda.download(host, other, 64, stream)
    cuda.synchronize(stream)
    np.testing.assert_array_equal(values, 0)  # recorded, not run
    cuda.launch(graph, stream)
    cuda.download(host, other, 64, stream)
    cuda.synchronize(stream)
    np.testing.assert_array_equal(values, np.arange(16))
    del values
    cuda.destroy_graph(graph)
    cuda.destroy_event(event)
    cuda.free(device)
    cuda.free(other)
    cuda.free_pinned(host)
    cuda.destroy_stream(stream)
