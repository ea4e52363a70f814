"""The plan of a build: scales by search or from ModelOpt, then what was asked for on top of them."""

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.artifacts.calibration_set import CalibrationSet
from qdm_deploy.artifacts.plan import QuantizationPlan
from qdm_deploy.artifacts.statistics import ActivationStatistics
from qdm_deploy.artifacts.topology import Topology
from qdm_deploy.building.layer_times import LayerTimer
from qdm_deploy.building.options import BuildOptions
from qdm_deploy.building.sensitivity import Budgeted, measured_and_kept
from qdm_deploy.progress import SILENT, Progress

if TYPE_CHECKING:
    from qdm_calibration.importance import StepImportance
    from qdm_calibration.plan import PlanOptions
    from qdm_export.unet import Checkpoint

__all__ = ["check_modelopt", "check_step_bins", "planned"]

Stage = Callable[[str], AbstractContextManager[None]]


def planned(
    options: BuildOptions,
    checkpoint: "Checkpoint",
    topology: Topology,
    calibration: CalibrationSet,
    statistics: ActivationStatistics,
    *,
    importance: "Callable[[], StepImportance]",
    stage: Stage,
    timer: LayerTimer | None = None,
    progress: Progress = SILENT,
) -> Budgeted:
    """Every decision of the plan, in the order in which they build on each other.

    Args:
        options: of the build.
        checkpoint: the network.
        topology: its layers.
        calibration: the rows that decisions are measured on.
        statistics: ranges of every activation on these rows.
        importance: measures how much each step matters; called only where a choice depends on it.
        stage: times what is done inside it.
        timer: measures what the layers of a plan take; called where their noise is measured. None: that is not known.
        progress: where to report.
    """
    with stage("plan"):
        if options.from_modelopt is not None:
            plan = _modelopt_plan(options, checkpoint, topology, calibration, statistics, progress)
        else:
            plan = _searched_plan(options, checkpoint, topology, calibration, statistics, importance, progress)
    if options.reconstruct != "none":
        with stage("reconstruct"):
            plan = _reconstructed(options, checkpoint, plan, calibration, progress)
    with stage("sensitivity"):
        budgeted = measured_and_kept(options, checkpoint, calibration, plan, progress, timer)
    if options.corrected_output == "none":
        return budgeted
    from qdm_calibration.output_correction import correct_output

    with stage("output correction"):
        plan = correct_output(checkpoint.unet, budgeted.plan, calibration, progress=progress)
    return replace(budgeted, plan=replace(plan, options={**plan.options, "output_correction": "auto"}))


def check_step_bins(options: BuildOptions, timesteps: NDArray[np.int64], num_train_timesteps: int) -> None:
    """Refuse more step bins than the calibrated timesteps can tell apart.

    Raises:
        InputError: with what to change.
    """
    from qdm_calibration.statistics import timestep_edges
    from qdm_calibration.step_bins import check_step_bins as check

    check(timestep_edges(timesteps, num_train_timesteps), options.step_bins)


def _searched_plan(
    options: BuildOptions,
    checkpoint: "Checkpoint",
    topology: Topology,
    calibration: CalibrationSet,
    statistics: ActivationStatistics,
    importance: "Callable[[], StepImportance]",
    progress: Progress,
) -> QuantizationPlan:
    from qdm_calibration.channel_factors import free_inputs, search_channel_factors
    from qdm_calibration.plan import make_plan
    from qdm_calibration.statistics import collect_scaled_inputs

    factors = None
    if options.channel_scales != "none":
        free = free_inputs(topology, options.targets)
        factors = search_channel_factors(
            checkpoint.unet,
            topology,
            statistics,
            calibration,
            ranges=options.ranges,
            zero_offset=options.zero_offset,
            weight_bits=options.weight_bits,
            branch_fold=options.concat_scales == "branch",
            channels=free if options.channel_scales == "free" else None,
            progress=progress,
        )
        inverse_k = {name: found.inverse_k for name, found in factors.items() if found.inverse_k is not None}
        scaled = collect_scaled_inputs(
            checkpoint.unet, topology, calibration, statistics.timestep_edges, inverse_k, progress=progress
        )
        statistics = replace(statistics, inputs={**statistics.inputs, **scaled})
    return make_plan(
        checkpoint.unet,
        topology,
        statistics,
        _plan_options(options),
        factors=factors,
        importance=lambda: importance().over(statistics.timestep_edges),
        provenance={"weights_sha256": checkpoint.weights_sha256},
        progress=progress,
    )


def _plan_options(options: BuildOptions) -> "PlanOptions":
    from qdm_calibration.plan import PlanOptions

    return PlanOptions(
        ranges=options.ranges,
        zero_offset=options.zero_offset,
        concat_scales=options.concat_scales,
        step_bins=options.step_bins,
        upsample_phases=options.upsample_phases,
        weight_bits=options.weight_bits,
    )


def check_modelopt(source: str) -> None:
    """Refuse before any work a ModelOpt source that cannot be used."""
    from qdm_calibration.modelopt import CONFIGS, read_quantizer_state, require_modelopt

    if source in CONFIGS:
        require_modelopt()
    else:
        read_quantizer_state(Path(source))


def _modelopt_plan(
    options: BuildOptions,
    checkpoint: "Checkpoint",
    topology: Topology,
    calibration: CalibrationSet,
    statistics: ActivationStatistics,
    progress: Progress,
) -> QuantizationPlan:
    from qdm_calibration.modelopt import CONFIGS, plan_from_modelopt, plan_from_quantizers, read_quantizer_state

    source, unet = str(options.from_modelopt), checkpoint.unet
    provenance = {"weights_sha256": checkpoint.weights_sha256}
    if source in CONFIGS:
        return plan_from_modelopt(
            unet, topology, calibration, source, statistics, provenance=provenance, progress=progress
        )
    path = Path(source)
    quantizers = read_quantizer_state(path)
    # The file's name alone: a bundle says nothing of the folders of the machine that built it.
    return plan_from_quantizers(unet, topology, quantizers, statistics, source=path.name, provenance=provenance)


def _reconstructed(
    options: BuildOptions,
    checkpoint: "Checkpoint",
    plan: QuantizationPlan,
    calibration: CalibrationSet,
    progress: Progress,
) -> QuantizationPlan:
    """The plan with learned rounding; finished blocks wait beside the bundle until all are."""
    from qdm_calibration.reconstruct import ReconstructOptions, reconstruct
    from qdm_calibration.step_size import learn_step_sizes

    folder = options.out.absolute().parent / f".{options.out.name}.reconstruction"
    chosen = ReconstructOptions(iterations=options.reconstruct_iterations, seed=options.seed, folder=folder)
    better = reconstruct(checkpoint.unet, plan, calibration, chosen, progress=progress)
    if options.reconstruct == "full":
        better = learn_step_sizes(checkpoint.unet, better, calibration, chosen, progress=progress)
    shutil.rmtree(folder)
    return replace(
        better,
        options={
            **plan.options,
            "reconstruct": options.reconstruct,
            "reconstruct_iterations": options.reconstruct_iterations,
        },
    )
