"""ONNX Runtime's own GPU providers on the graphs of the GPU suite: what a user would run in place of an engine."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from lib.gpu_timing import timed

from qdm_deploy.artifacts.pipeline_spec import Denoiser
from qdm_deploy.errors import EnvironmentProblem
from qdm_deploy.metrics.error import sqnr_db
from qdm_deploy.samplers.random_inputs import random_inputs

# What runs the nodes that a provider leaves.
_FALLBACKS = {
    "CPUExecutionProvider": (),
    "CUDAExecutionProvider": ("CPUExecutionProvider",),
    "TensorrtExecutionProvider": ("CUDAExecutionProvider", "CPUExecutionProvider"),
}
_OUTPUTS = ["next_sample", "x0"]
_DEVICE = ("cuda", 0)


def offered_providers() -> list[str]:
    """The GPU providers of this onnxruntime, ready to be used.

    Raises:
        EnvironmentProblem: It has none.
    """
    import onnxruntime as ort

    offered = [name for name, others in _FALLBACKS.items() if others and name in ort.get_available_providers()]
    if not offered:
        raise EnvironmentProblem("this onnxruntime has no GPU provider; install onnxruntime-gpu in its place")
    ort.preload_dlls()  # CUDA and cuDNN of the nvidia-* packages, where PyTorch did not load them already
    return offered


def measure_provider(
    graph: Path, provider: str, model: Denoiser, batches: tuple[int, ...], runs: int
) -> dict[str, Any]:
    """Distance from the CPU, nodes by provider, and times of a step whose tensors travel and of one on the GPU."""
    inputs = random_inputs(model, 4)
    expected = _session(graph, "CPUExecutionProvider").run(_OUTPUTS, dict(inputs))
    session = _session(graph, provider)
    found = session.run(_OUTPUTS, dict(inputs))
    # A provider that is listed may still leave nodes to the CPU, and its times would be the CPU's.
    nodes: Counter[str] = Counter()
    for part in session.get_provider_graph_assignment_info():
        nodes[part.ep_name] += len(part.get_nodes())
    result: dict[str, Any] = {
        "nodes": dict(nodes),
        "sqnr_db_against_cpu": {name: sqnr_db(a, b) for name, a, b in zip(_OUTPUTS, expected, found, strict=True)},
        "ms": {},
    }
    for batch in batches:
        inputs = random_inputs(model, batch)
        times = result["ms"][str(batch)] = {
            "run": timed(lambda: session.run(_OUTPUTS, dict(inputs)), runs),  # noqa: B023  # called at once
            "on the GPU": _bound(session, inputs, runs),
        }
        if provider == "CUDAExecutionProvider":
            try:
                recorded = _session(graph, provider, {"enable_cuda_graph": "1"})
                times["on the GPU, cuda graph"] = _bound(recorded, inputs, runs)
            except Exception as error:  # noqa: BLE001  # nodes left on the CPU forbid it, and no base class is shared
                times["on the GPU, cuda graph"] = {"error": str(error)}
    return result


def _session(graph: Path, provider: str, options: dict[str, str] | None = None) -> Any:
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = ort.InferenceSession(graph, settings, providers=[(provider, options or {}), *_FALLBACKS[provider]])
    if provider not in session.get_providers():
        raise EnvironmentProblem(f"onnxruntime fell back to {', '.join(session.get_providers())}")
    return session


def _bound(session: Any, inputs: dict[str, Any], runs: int) -> dict[str, float]:
    import onnxruntime as ort

    binding, held = session.io_binding(), []
    for name, value in inputs.items():
        held.append(ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value), *_DEVICE))
        binding.bind_ortvalue_input(name, held[-1])
    for name in _OUTPUTS:
        held.append(ort.OrtValue.ortvalue_from_shape_and_type(list(inputs["sample"].shape), np.float32, *_DEVICE))
        binding.bind_ortvalue_output(name, held[-1])
    return timed(lambda: session.run_with_iobinding(binding), runs)
