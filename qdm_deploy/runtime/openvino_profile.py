"""What every convolution and matrix product of a step graph takes on OpenVINO's CPU plugin, by its own profile."""

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from numpy.typing import NDArray

from qdm_deploy.runtime.cpu import available_cores
from qdm_deploy.runtime.openvino_session import import_openvino

__all__ = ["product_times"]

_PRODUCTS = ("Convolution", "FullyConnected", "MatMul")
# The reader takes a convolution apart into itself and the addition of its bias, and names the first of them so.
_APART = "/WithoutBiases"
_SETTLING = 3


def product_times(
    graph: Path, inputs: Mapping[str, NDArray[Any]], *, threads: int | None = None, runs: int = 9
) -> tuple[dict[str, float], float]:
    """Milliseconds by node name, and those of the whole step; medians of ``runs`` steps.

    What OpenVINO fuses into a product (a bias, an activation, a quantize behind it) counts with it.

    Args:
        graph: ONNX file of the step graph; external data beside it.
        inputs: of ``StepSession.run``.
        threads: of the step; None takes the cores this process may use.
        runs: steps that count, after a few that do not.

    Raises:
        EnvironmentProblem: the openvino package is missing.
    """
    ov = import_openvino()
    core = ov.Core()
    model = core.read_model(str(graph))
    model.reshape({item.any_name: list(inputs[item.any_name].shape) for item in model.inputs})
    options = {
        "PERF_COUNT": True,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": threads or available_cores(),
        "ENABLE_CPU_PINNING": False,
    }
    request = core.compile_model(model, "CPU", options).create_infer_request()
    for item in model.inputs:
        request.set_tensor(item.any_name, ov.Tensor(inputs[item.any_name]))
    found: dict[str, list[float]] = {}
    steps = []
    for number in range(_SETTLING + runs):
        request.infer()
        if number < _SETTLING:
            continue
        steps.append(request.latency)
        for node in request.profiling_info:
            if node.node_type in _PRODUCTS:
                name = node.node_name.removesuffix(_APART)
                found.setdefault(name, []).append(1000 * node.real_time.total_seconds())
    return {name: median(values) for name, values in found.items()}, median(steps)
