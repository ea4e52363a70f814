"""What each INT8 layer would add to a step in float, measured where the backend tells the times of single nodes."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from qdm_deploy.artifacts.phase_sums import PHASES
from qdm_deploy.artifacts.pipeline_spec import Denoiser
from qdm_deploy.artifacts.plan import LayerPlan, QuantizationPlan
from qdm_deploy.backends.openvino.profile import StepProfile, step_profiles
from qdm_deploy.building.options import BuildOptions
from qdm_deploy.progress import Progress
from qdm_deploy.runtime.cpu import saturates_int8
from qdm_deploy.samplers.random_inputs import random_inputs

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["LayerTimer", "LayerTimes", "can_be_timed"]

_BATCH = 4
# Two compiled graphs of a model this large would not fit beside the rest of a build.
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
    """Whether a build makes a graph for a backend that tells the times of single nodes, and that backend is here.

    Where this CPU's INT8 products saturate it multiplies the codes in float32, and such times say nothing of INT8.
    """
    return "openvino" in options.targets and find_spec("openvino") is not None and not saturates_int8()


@dataclass(frozen=True)
class LayerTimer:
    """Times the step graphs of plans for one model.

    Attributes:
        options: of the build.
        float_graph: the float step graph.
        denoiser: the model's.
        progress: where to report.
    """

    options: BuildOptions
    float_graph: "ir.Model"
    denoiser: Denoiser
    progress: Progress

    def layer_times(self, plan: QuantizationPlan) -> LayerTimes | None:
        """Of the plan's INT8 layers, from its graph and the same graph with nothing in INT8.

        None where the model is too large, ``can_be_timed`` says no, or the backend's profile says too little.
        """
        weights = sum(prod(layer.layer.weight_shape) for layer in plan.layers)
        if not can_be_timed(self.options) or weights > _MOST_WEIGHTS:
            return None
        nothing = tuple(LayerPlan(item.layer, "float", reason="timed") for item in plan.layers)
        profiles = self._profiles({"int8": plan, "float": replace(plan, layers=nothing)})
        names = self._layer_names(plan)
        int8, in_float = (_by_layer(profile.products, names) for profile in profiles)
        planned = [layer.name for layer in plan.quantized]
        if any(name not in int8 or name not in in_float for name in planned):
            self.progress.say(
                "OpenVINO's profile does not name every layer, so the report says nothing of single layers' times"
            )
            return None
        extra = {name: in_float[name] - int8[name] for name in planned}
        # Whatever the clock said, a step takes what its products take, so that no prediction falls below 0.
        step = max(profiles[0].step_ms, sum(int8[name] for name in planned))
        return LayerTimes(step, extra, f"OpenVINO, a batch of {_BATCH}")

    def longer(self, plan: QuantizationPlan, kept: QuantizationPlan) -> float:
        """By which part a step of ``kept`` takes longer than one of ``plan``, below 0 if it is shorter; measured."""
        whole, changed = self._profiles({"whole": plan, "kept": kept})
        return changed.step_ms / whole.step_ms - 1

    def _profiles(self, plans: Mapping[str, QuantizationPlan]) -> list[StepProfile]:
        from qdm_export.shared_weights import save_with_shared_weights
        from qdm_export.targets import emit

        with (
            self.progress.task("Timing layers", len(plans)) as advance,
            tempfile.TemporaryDirectory(prefix="qdm-deploy-") as folder,
        ):
            graphs = [Path(folder) / f"{label}.onnx" for label in plans]
            for graph, plan in zip(graphs, plans.values(), strict=True):
                model = emit(self.float_graph, plan, "openvino").model
                save_with_shared_weights([(graph, model)], graph.with_suffix(".bin"))
                advance()
            return step_profiles(graphs, random_inputs(self.denoiser, _BATCH), threads=self.options.threads)

    def _layer_names(self, plan: QuantizationPlan) -> dict[str, str]:
        """The layer of a node, by the node's name in any graph of the plan."""
        from qdm_export.topology import layer_nodes

        names = {layer.name: layer.name for layer in plan.layers}
        names |= {f"{layer.name}/phase_{number}": layer.name for layer in plan.layers for number in range(len(PHASES))}
        for layer in layer_nodes(self.float_graph):
            # A product that stays in float has the names of its nodes: of itself, or of the addition fused into it.
            names |= {str(node.name): layer.name for node in (layer.node, layer.bias_add) if node is not None}
        return names


def _by_layer(times: Mapping[str, float], names: Mapping[str, str]) -> dict[str, float]:
    """Summed over the nodes of a layer: one, or one for each phase."""
    found: dict[str, float] = {}
    for node, value in times.items():
        if node in names:
            found[names[node]] = found.get(names[node], 0.0) + value
    return found
