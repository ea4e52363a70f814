"""Calibration inside a build; whatever can be refused is refused before the first long stage."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qdm_deploy.artifacts.calibration_set import CalibrationSet
from qdm_deploy.artifacts.plan import QuantizationPlan
from qdm_deploy.building.layer_times import LayerTimer
from qdm_deploy.building.options import BuildOptions
from qdm_deploy.building.planning import check_modelopt, check_step_bins, planned
from qdm_deploy.building.sensitivity import Budgeted, check_keep_fp
from qdm_deploy.components.prompt_lists import packaged_prompts, read_prompts
from qdm_deploy.components.sampling import SamplingMaker
from qdm_deploy.errors import InputError
from qdm_deploy.progress import Progress
from qdm_deploy.report.ranges import InputRanges, input_ranges
from qdm_deploy.samplers import StepTable
from qdm_deploy.samplers.sampling import Sampling

if TYPE_CHECKING:
    import onnx_ir as ir

    from qdm_calibration.importance import StepImportance
    from qdm_calibration.timesteps import SamplingPlan
    from qdm_export.unet import Checkpoint

__all__ = ["Calibrated", "calibrated_plan", "calibration_given"]


@dataclass(frozen=True)
class Calibrated:
    """What calibration and planning leave behind: the statistics themselves are too large to keep through a build.

    Attributes:
        calibration: the set.
        budgeted: the plan, and the noise of its layers where it was measured.
        inputs: ranges of the layers' inputs.
    """

    calibration: CalibrationSet
    budgeted: Budgeted
    inputs: tuple[InputRanges, ...]

    @property
    def plan(self) -> QuantizationPlan:
        """The plan that is emitted."""
        return self.budgeted.plan


def calibration_given(options: BuildOptions, checkpoint: "Checkpoint", maker: SamplingMaker) -> CalibrationSet | None:
    """The calibration set the user gave, if any, after refusing all that cannot end well.

    Raises:
        InputError: the set does not fit the model, conditions are missing, or there are more step bins than the
            calibration can tell apart.
    """
    from qdm_calibration.timesteps import sampling_plan

    if options.from_modelopt is not None:
        check_modelopt(options.from_modelopt)
    denoiser = checkpoint.denoiser
    maker.make([options.seed])  # refuses what the model or its conditions do not fit
    if options.calibration_file is None:
        draw = sampling_plan(_plan_of(options), maker.table, denoiser.num_train_timesteps, options.seed)
        given, timesteps = None, np.floor(maker.table.timesteps[draw.step]).astype(np.int64)
    else:
        given = CalibrationSet.load(options.calibration_file)
        _check_fits(given, checkpoint, options.calibration_file)
        timesteps = given.timestep
    check_step_bins(options, timesteps, denoiser.num_train_timesteps)
    return given


def calibration_sampling(
    options: BuildOptions, maker: SamplingMaker, count: int, *, table: StepTable | None = None
) -> Sampling:
    """Samplings of the calibration: its seeds and, for a model that takes prompts, its prompts."""
    prompts, negatives = None, None
    if maker.pipeline.text_encoders:
        listed = packaged_prompts("calibration")
        if options.prompts_file is not None:
            listed = read_prompts(options.prompts_file).every_second(0)
        prompts, negatives = listed.in_turn(count)
    return maker.make(range(options.seed, options.seed + count), prompts, negatives, table=table)


def calibrated_plan(
    options: BuildOptions,
    checkpoint: "Checkpoint",
    maker: SamplingMaker,
    given: CalibrationSet | None,
    float_graph: "ir.Model",
    stage: Callable[[str], AbstractContextManager[None]],
    progress: Progress,
) -> Calibrated:
    """Sample the calibration set unless one was given, measure every activation, and decide."""
    from qdm_calibration.collect import collect_calibration_set
    from qdm_calibration.statistics import collect_statistics
    from qdm_export.topology import topology_of

    denoiser = checkpoint.denoiser
    topology = topology_of(float_graph)
    check_keep_fp(options, topology)
    with stage("calibrate"):
        calibration = given or collect_calibration_set(
            checkpoint.unet,
            denoiser,
            calibration_sampling(options, maker, options.calibration_samples),
            _plan_of(options),
            provenance={"model": checkpoint.spec.name, "weights_sha256": checkpoint.weights_sha256},
            progress=progress,
        )
        if options.save_calibration is not None:
            calibration.save(options.save_calibration)
        statistics = collect_statistics(
            checkpoint.unet, topology, calibration, denoiser.num_train_timesteps, progress=progress
        )

    # At most once, and only where a choice depends on it.
    @functools.cache
    def importance() -> "StepImportance":
        return _importance(options, checkpoint, maker, progress)

    timer = LayerTimer(options, float_graph, denoiser, progress)
    budgeted = planned(
        options, checkpoint, topology, calibration, statistics,
        importance=importance, stage=stage, timer=timer, progress=progress,
    )  # fmt: skip
    return Calibrated(calibration, budgeted, input_ranges(statistics, budgeted.plan))


def _importance(
    options: BuildOptions, checkpoint: "Checkpoint", maker: SamplingMaker, progress: Progress
) -> "StepImportance":
    """Over the sampler that the bundle is built for, on seeds of the calibration."""
    from qdm_calibration.importance import MOST_STEPS, SEEDS, measure_importance

    table = maker.table_of(maker.run.sampler, min(maker.run.steps, MOST_STEPS))
    sampling = calibration_sampling(options, maker, SEEDS, table=table)
    return measure_importance(checkpoint.unet, checkpoint.denoiser, sampling, progress=progress)


def _plan_of(options: BuildOptions) -> "SamplingPlan":
    from qdm_calibration.timesteps import SamplingPlan

    return SamplingPlan(
        strategy=options.strategy,
        samples=options.calibration_samples,
        steps=options.calibration_steps,
        count=options.ndtc_count,
        mean=options.ndtc_mean,
        spread=options.ndtc_spread,
    )


def _check_fits(calibration: CalibrationSet, checkpoint: "Checkpoint", path: Path) -> None:
    spec, last = checkpoint.spec, checkpoint.denoiser.num_train_timesteps
    made_from = calibration.provenance.get("weights_sha256")
    if made_from is not None and made_from != checkpoint.weights_sha256:
        raise InputError(
            f"{path} was sampled from other weights than those of {checkpoint.source}; leave --calibration out"
        )
    if calibration.sample.shape[1:] != spec.sample_shape:
        raise InputError(
            f"{path} has samples of shape {calibration.sample.shape[1:]}; {spec.name} takes {spec.sample_shape}"
        )
    names = {item.name for item in spec.interface.conditions}
    if set(calibration.conditioning) != names:
        raise InputError(
            f"{path} has the conditioning {sorted(calibration.conditioning)}; {spec.name} takes {sorted(names)}"
        )
    if int(calibration.timestep.min()) < 0 or int(calibration.timestep.max()) >= last:
        raise InputError(f"{path} has timesteps outside 0 to {last - 1}, which {spec.name} was trained with")
