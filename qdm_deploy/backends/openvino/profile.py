"""What every convolution and matrix product of a step graph takes on OpenVINO's CPU plugin, by its own profile."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from numpy.typing import NDArray

from qdm_deploy.backends.openvino.graph import compile_graph, import_openvino, read_graph
from qdm_deploy.runtime.cpu import available_cores

__all__ = ["StepProfile", "step_profiles", "turn_means"]

_PRODUCTS = ("Convolution", "FullyConnected", "MatMul")
# The reader takes a convolution apart into itself and the addition of its bias, and names the first of them so.
_APART = "/WithoutBiases"
_TURNS = 5
# Steps of a turn: enough that the first, on cold caches, hardly counts, and less than a second for a large model.
_MOST_STEPS, _TURN_MS = 6, 600.0


@dataclass(frozen=True)
class StepProfile:
    """Milliseconds of one step of a graph.

    Attributes:
        products: of every convolution and matrix product, by node name. What OpenVINO fuses into one (a bias, an
            activation, a quantize behind it) counts with it.
        step_ms: of the whole step.
    """

    products: dict[str, float]
    step_ms: float


def step_profiles(
    graphs: Sequence[Path], inputs: Mapping[str, NDArray[Any]], *, threads: int | None = None
) -> list[StepProfile]:
    """Profiles of several graphs, taken in turn, so that a machine that gets slower does so for each of them.

    Args:
        graphs: ONNX files of step graphs of one model; external data beside them.
        inputs: of ``StepSession.run``.
        threads: of a step; None takes the cores this process may use.

    Returns:
        One profile a graph: medians of a few turns of some steps each.

    Raises:
        EnvironmentProblem: the openvino package is missing.
    """
    runs = [_Run(graph, inputs, threads or available_cores()) for graph in graphs]
    for run in runs:
        run.turn(2)  # the first does not count: it also arranges weights and memory
    slowest = max(run.steps[-1] for run in runs)
    steps = min(_MOST_STEPS, max(1, round(_TURN_MS / slowest)))
    for _ in range(_TURNS):
        for run in runs:
            run.turn(steps)
    return [run.profile() for run in runs]


class _Run:
    """A compiled graph, and what its turns told."""

    def __init__(self, graph: Path, inputs: Mapping[str, NDArray[Any]], threads: int) -> None:
        ov = import_openvino()
        model = read_graph(graph)
        model.reshape({item.any_name: list(inputs[item.any_name].shape) for item in model.inputs})
        options = {
            "PERF_COUNT": True,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": threads,
            "ENABLE_CPU_PINNING": False,
        }
        self._request = compile_graph(ov.Core(), model, options).create_infer_request()
        for item in model.inputs:
            self._request.set_tensor(item.any_name, ov.Tensor(inputs[item.any_name]))
        self.steps: list[float] = []
        self._turns: list[tuple[int, dict[str, float]]] = []

    def turn(self, steps: int) -> None:
        for _ in range(steps):
            self._request.infer()
            self.steps.append(self._request.latency)
        averages = {
            node.node_name.removesuffix(_APART): 1000 * node.real_time.total_seconds()
            for node in self._request.profiling_info
            if node.node_type in _PRODUCTS
        }
        self._turns.append((len(self.steps), averages))

    def profile(self) -> StepProfile:
        first, names = self._turns[0]
        products = {
            name: median(turn_means([(steps, averages[name]) for steps, averages in self._turns])) for name in names
        }
        return StepProfile(products, median(self.steps[first:]))


def turn_means(averages: Sequence[tuple[int, float]]) -> list[float]:
    """Mean of every turn but the first, from the averages over all steps since the beginning that OpenVINO gives.

    Args:
        averages: at the end of each turn: how many steps there were since the beginning, and their average.
    """
    return [
        (steps * average - before * earlier) / (steps - before)
        for (before, earlier), (steps, average) in pairwise(averages)
    ]
