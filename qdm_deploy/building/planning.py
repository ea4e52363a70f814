"""The plan of a model from top to bottom: scales, rounding, layers that stay in float, the output's correction."""

import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qdm_deploy.artifacts.calibration_set import CalibrationSet
from qdm_deploy.artifacts.plan import QuantizationPlan, Target
from qdm_deploy.artifacts.recipe import Recipe
from qdm_deploy.artifacts.statistics import ActivationStatistics
from qdm_deploy.artifacts.topology import Topology
from qdm_deploy.building.float_layers import Budgeted, choose_float_layers
from qdm_deploy.building.layer_times import LayerTimer
from qdm_deploy.progress import SILENT, Progress

if TYPE_CHECKING:
    from torch import nn

    from qdm_calibration.channel_factors import ChannelFactors
    from qdm_calibration.importance import StepImportance
    from qdm_export.unet import Checkpoint

__all__ = ["Stage", "make_plan"]

Stage = Callable[[str], AbstractContextManager[None]]


def make_plan(
    recipe: Recipe,
    checkpoint: "Checkpoint",
    topology: Topology,
    calibration: CalibrationSet,
    statistics: ActivationStatistics,
    *,
    targets: tuple[Target, ...],
    min_sqnr_db: float,
    seed: int,
    folder: Path,
    importance: "Callable[[], StepImportance]",
    stage: Stage,
    timer: LayerTimer | None = None,
    progress: Progress = SILENT,
) -> Budgeted:
    """Every decision of a plan, in the order in which they build on each other.

    Args:
        recipe: what is chosen, and how.
        checkpoint: the network.
        topology: its layers.
        calibration: the rows that decisions are measured on.
        statistics: ranges of every activation on these rows.
        targets: where the plan shall run: factors are free where they cost no operation on any of them.
        min_sqnr_db: of the model's output, in dB; what ``keep_fp`` "auto" goes for.
        seed: of what is random in learning.
        folder: keeps what was learned until all is; removed then. An interrupted run goes on behind it.
        importance: measures how much each step matters; called only where a choice depends on it.
        stage: times what is done inside it.
        timer: measures what the layers of a plan take; called where their noise is measured. None: that is not known.
        progress: where to report.
    """
    network = checkpoint.unet
    provenance = {"weights_sha256": checkpoint.weights_sha256}
    with stage("plan"):
        if recipe.from_modelopt != "none":
            plan = _import_modelopt(recipe.from_modelopt, network, topology, calibration, statistics, progress)
        else:
            plan = _search_scales(recipe, network, topology, calibration, statistics, targets, importance, progress)
        plan = replace(plan, provenance={**plan.provenance, **provenance})
    if recipe.weights.reconstruct != "none":
        with stage("reconstruct"):
            plan = _learn_rounding(recipe, network, plan, calibration, seed, folder, progress)
    with stage("sensitivity"):
        budgeted = choose_float_layers(
            recipe, network, plan, calibration, min_sqnr_db=min_sqnr_db, timer=timer, progress=progress
        )
    plan = budgeted.plan
    if recipe.output_correction:
        from qdm_calibration.output_correction import correct_output

        with stage("output correction"):
            plan = correct_output(network, plan, calibration, progress=progress)
    return replace(budgeted, plan=replace(plan, options=recipe.document()))


def _search_scales(
    recipe: Recipe,
    network: "nn.Module",
    topology: Topology,
    calibration: CalibrationSet,
    statistics: ActivationStatistics,
    targets: tuple[Target, ...],
    importance: "Callable[[], StepImportance]",
    progress: Progress,
) -> QuantizationPlan:
    """Our own scales: factors per channel where the recipe allows them, then all others."""
    from qdm_calibration.channel_factors import free_inputs, search_channel_factors
    from qdm_calibration.plan import plan_scales
    from qdm_calibration.statistics import collect_scaled_inputs

    factors: Mapping[str, ChannelFactors] | None = None
    modes = {name: recipe.layer(layers[0].name).channel_factors for name, layers in topology.groups().items()}
    if any(mode != "none" for mode in modes.values()):
        free = free_inputs(topology, targets)
        offered = {name for name, mode in modes.items() if mode == "auto" or (mode == "free" and name in free)}
        factors = search_channel_factors(
            network, topology, statistics, calibration, recipe, channels=offered, progress=progress
        )
        inverse_k = {name: found.inverse_k for name, found in factors.items() if found.inverse_k is not None}
        scaled = collect_scaled_inputs(
            network, topology, calibration, statistics.timestep_edges, inverse_k, progress=progress
        )
        statistics = replace(statistics, inputs={**statistics.inputs, **scaled})
    return plan_scales(
        network,
        topology,
        statistics,
        recipe,
        factors=factors,
        importance=lambda: importance().over(statistics.timestep_edges),
        progress=progress,
    )


def _import_modelopt(
    source: str,
    network: "nn.Module",
    topology: Topology,
    calibration: CalibrationSet,
    statistics: ActivationStatistics,
    progress: Progress,
) -> QuantizationPlan:
    """ModelOpt's scales: of one of its configurations, run here, or of a file."""
    from qdm_calibration.modelopt import CONFIGS, plan_from_modelopt, plan_from_quantizers, read_quantizer_state

    if source in CONFIGS:
        return plan_from_modelopt(network, topology, calibration, source, statistics, progress=progress)
    path = Path(source)
    # The file's name alone: a bundle says nothing of the folders of the machine that built it.
    return plan_from_quantizers(network, topology, read_quantizer_state(path), statistics, source=path.name)


def _learn_rounding(
    recipe: Recipe,
    network: "nn.Module",
    plan: QuantizationPlan,
    calibration: CalibrationSet,
    seed: int,
    folder: Path,
    progress: Progress,
) -> QuantizationPlan:
    """The plan with learned weight codes and, if asked for, learned activation scales."""
    from qdm_calibration.reconstruct import ReconstructOptions, reconstruct
    from qdm_calibration.step_size import learn_step_sizes

    options = ReconstructOptions(iterations=recipe.weights.iterations, seed=seed, folder=folder)
    plan = reconstruct(network, plan, calibration, options, progress=progress)
    if recipe.weights.reconstruct == "full":
        plan = learn_step_sizes(network, plan, calibration, options, progress=progress)
    shutil.rmtree(folder)
    return plan
