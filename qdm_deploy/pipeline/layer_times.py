"""What each INT8 layer would add to a step in float, measured where the backend tells the times of single nodes."""

import tempfile
from dataclasses import dataclass, replace
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from qdm_deploy.artifacts.model_spec import ModelSpec
from qdm_deploy.artifacts.plan import LayerPlan, QuantizationPlan
from qdm_deploy.pipeline.options import BuildOptions
from qdm_deploy.progress import Progress
from qdm_deploy.runtime.openvino_profile import product_times
from qdm_deploy.runtime.random_inputs import random_inputs

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["LayerTimes", "can_be_timed", "measured_layer_times"]

_BATCH = 4
# Two more graphs of a model this large would not fit beside the rest of a build.
_MOST_WEIGHTS = 2**28


@dataclass(frozen=True)
class LayerTimes:
    """Times of one step, in milliseconds.

    Attributes:
        step_ms: with every planned layer in INT8.
        extra_ms: what a layer's convolution or matrix product takes more in float than in INT8, by layer; below 0
            where INT8 is the slower one.
        measured_on: backend and batch, for the report.
    """

    step_ms: float
    extra_ms: dict[str, float]
    measured_on: str


def can_be_timed(options: BuildOptions) -> bool:
    """Whether a build makes a graph for a backend that tells the times of single nodes, and that backend is here."""
    return "openvino" in options.targets and find_spec("openvino") is not None


def measured_layer_times(
    options: BuildOptions, float_graph: "ir.Model", plan: QuantizationPlan, spec: ModelSpec, progress: Progress
) -> LayerTimes | None:
    """Run the plan's graph and the same graph with nothing in INT8; None where that cannot be, or says too little.

    Args:
        options: of the build.
        float_graph: the float step graph.
        plan: every layer that may be INT8 is.
        spec: the model's.
        progress: where to report.
    """
    weights = sum(prod(layer.layer.weight_shape) for layer in plan.layers)
    if not can_be_timed(options) or weights > _MOST_WEIGHTS:
        return None
    from qdm_export.shared_weights import save_with_shared_weights
    from qdm_export.targets import emit
    from qdm_export.topology import layer_nodes

    names = {layer.name: layer.name for layer in plan.layers}
    for layer in layer_nodes(float_graph):
        # A product that stays in float has the names of its nodes: of itself, or of the addition fused into it.
        names |= {str(node.name): layer.name for node in (layer.node, layer.bias_add) if node is not None}
    nothing = replace(plan, layers=tuple(LayerPlan(item.layer, "float", reason="timed") for item in plan.layers))
    found: list[dict[str, float]] = []
    steps: list[float] = []
    with progress.task("Timing layers", 2) as advance, tempfile.TemporaryDirectory(prefix="qdm-deploy-") as folder:
        for label, timed in (("int8", plan), ("float", nothing)):
            graph = Path(folder) / f"{label}.onnx"
            save_with_shared_weights([(graph, emit(float_graph, timed, "openvino"))], graph.with_suffix(".bin"))
            times, step = product_times(graph, random_inputs(spec, _BATCH), threads=options.threads)
            found.append({names[node]: value for node, value in times.items() if node in names})
            steps.append(step)
            advance()
    int8, in_float = found
    planned = [layer.name for layer in plan.quantized]
    if any(name not in int8 or name not in in_float for name in planned):
        progress.say("OpenVINO's profile does not name every layer, so the report says nothing of single layers' times")
        return None
    extra = {name: in_float[name] - int8[name] for name in planned}
    # Whatever the clock said, a step takes what its products take, so that no prediction falls below 0.
    step = max(steps[0], sum(int8[name] for name in planned))
    return LayerTimes(step, extra, f"OpenVINO, a batch of {_BATCH}")
