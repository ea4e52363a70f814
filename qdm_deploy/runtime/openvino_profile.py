"""What every convolution and matrix product of a step graph takes on OpenVINO's CPU plugin, by its own profile."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from numpy.typing import NDArray

from qdm_deploy.runtime.cpu import available_cores
from qdm_deploy.runtime.openvino_session import import_openvino

__all__ = ["product_times", "turn_means"]

_PRODUCTS = ("Convolution", "FullyConnected", "MatMul")
# The reader takes a convolution apart into itself and the addition of its bias, and names the first of them so.
_APART = "/WithoutBiases"
_TURNS, _TURN = 5, 4


def product_times(
    graph: Path, inputs: Mapping[str, NDArray[Any]], *, threads: int | None = None
) -> tuple[dict[str, float], float]:
    """Milliseconds by node name, and those of the whole step; medians of a few turns of some steps each.

    What OpenVINO fuses into a product (a bias, an activation, a quantize behind it) counts with it.

    Args:
        graph: ONNX file of the step graph; external data beside it.
        inputs: of ``StepSession.run``.
        threads: of the step; None takes the cores this process may use.

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
    turns, steps = [], []
    for _turn in range(1 + _TURNS):  # the first does not count: it also arranges weights and memory
        for _ in range(_TURN):
            request.infer()
            steps.append(request.latency)
        turns.append(
            {
                node.node_name.removesuffix(_APART): 1000 * node.real_time.total_seconds()
                for node in request.profiling_info
                if node.node_type in _PRODUCTS
            }
        )
    return {name: median(turn_means([turn[name] for turn in turns], _TURN)) for name in turns[0]}, median(steps[_TURN:])


def turn_means(averages: Sequence[float], steps: int) -> list[float]:
    """Mean of every turn but the first, from the averages over all steps since the beginning that OpenVINO gives.

    Args:
        averages: at the end of each turn, at least two.
        steps: in each turn.
    """
    totals = [average * steps * (number + 1) for number, average in enumerate(averages)]
    return [(after - before) / steps for before, after in pairwise(totals)]
