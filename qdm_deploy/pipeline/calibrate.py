"""Calibration and planning inside a build; whatever can be refused is refused before the first long stage."""

import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.artifacts.calibration_set import CalibrationSet
from qdm_deploy.artifacts.plan import QuantizationPlan
from qdm_deploy.artifacts.statistics import ActivationStatistics
from qdm_deploy.artifacts.topology import Topology
from qdm_deploy.errors import InputError
from qdm_deploy.pipeline.conditioning import conditioning_of, read_hidden_states
from qdm_deploy.pipeline.options import BuildOptions
from qdm_deploy.progress import Progress
from qdm_deploy.samplers import StepTable

if TYPE_CHECKING:
    import onnx_ir as ir

    from qdm_calibration.timesteps import SamplingPlan
    from qdm_export.unet import Checkpoint

__all__ = ["calibrated_plan", "calibration_given"]

_DEFAULT_STEP_BINS = 4
_STATES, _NULL_STATES = "encoder_hidden_states", "unconditional_hidden_states"


def calibration_given(options: BuildOptions, checkpoint: "Checkpoint", table: StepTable) -> CalibrationSet | None:
    """The calibration set the user gave, if any, after refusing all that cannot end well.

    Raises:
        InputError: the set does not fit the model, conditioning is missing, or there are more step bins than the
            calibration can tell apart.
    """
    from qdm_calibration.collect import conditioning_rows, unconditional_rows
    from qdm_calibration.timesteps import sampling_plan

    if options.from_modelopt is not None:
        _check_modelopt(options.from_modelopt)
    spec = checkpoint.spec
    states = read_hidden_states(options.conditioning_file)
    conditioning_of(spec, options.verify_samples, hidden_states=states)
    if options.guidance != 1.0:
        unconditional_rows(spec, 1, _renamed(states, _NULL_STATES))
    if options.calibration_file is None:
        conditioning_rows(spec, options.calibration_samples, _renamed(states, _STATES))
        draw = sampling_plan(_sampling(options), table, spec.num_train_timesteps, options.seed)
        given, timesteps = None, table.timesteps[draw.step]
    else:
        given = CalibrationSet.load(options.calibration_file)
        _check_fits(given, checkpoint, options.calibration_file)
        timesteps = given.timestep
    _step_bins(options, timesteps, spec.num_train_timesteps)
    return given


def calibrated_plan(
    options: BuildOptions,
    checkpoint: "Checkpoint",
    table: StepTable,
    given: CalibrationSet | None,
    float_graph: "ir.Model",
    stage: Callable[[str], AbstractContextManager[None]],
    progress: Progress,
) -> tuple[CalibrationSet, QuantizationPlan]:
    """Sample the calibration set unless one was given, measure every activation, and decide."""
    from qdm_calibration.collect import collect_calibration_set
    from qdm_calibration.statistics import collect_statistics
    from qdm_export.topology import topology_of

    spec = checkpoint.spec
    topology = topology_of(float_graph)
    _check_keep_fp(options, topology)
    with stage("calibrate"):
        states = read_hidden_states(options.conditioning_file)
        calibration = given or collect_calibration_set(
            checkpoint.unet,
            spec,
            table,
            _sampling(options),
            seed=options.seed,
            guidance=options.guidance,
            conditioning=_renamed(states, _STATES),
            unconditional=_renamed(states, _NULL_STATES),
            provenance={"model": spec.name, "weights_sha256": checkpoint.weights_sha256},
            progress=progress,
        )
        if options.save_calibration is not None:
            calibration.save(options.save_calibration)
        statistics = collect_statistics(
            checkpoint.unet, topology, calibration, spec.num_train_timesteps, progress=progress
        )
    with stage("plan"):
        if options.from_modelopt is not None:
            plan = _modelopt_plan(options, checkpoint, topology, calibration, statistics, progress)
        else:
            plan = _searched_plan(options, checkpoint, topology, calibration, statistics, progress)
    if options.reconstruct != "none":
        with stage("reconstruct"):
            plan = _reconstructed(options, checkpoint, plan, calibration, progress)
    if options.bias_correction == "auto":
        from qdm_calibration.bias_correction import correct_biases

        with stage("bias correction"):
            plan = correct_biases(checkpoint.unet, plan, calibration, progress=progress)
            plan = replace(plan, options={**plan.options, "bias_correction": "auto"})
    if options.keep_fp is not None:
        with stage("sensitivity"):
            plan = _within_budget(options, checkpoint, calibration, plan, progress)
    return calibration, plan


def _searched_plan(
    options: BuildOptions,
    checkpoint: "Checkpoint",
    topology: Topology,
    calibration: CalibrationSet,
    statistics: ActivationStatistics,
    progress: Progress,
) -> QuantizationPlan:
    from qdm_calibration.channel_factors import search_channel_factors
    from qdm_calibration.plan import PlanOptions, make_plan
    from qdm_calibration.statistics import collect_scaled_inputs

    factors = None
    if options.channel_scales == "auto":
        factors = search_channel_factors(
            checkpoint.unet,
            topology,
            statistics,
            calibration,
            ranges=options.ranges,
            zero_offset=options.zero_offset,
            weight_bits=options.weight_bits,
            branch_fold=options.concat_scales == "branch",
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
        PlanOptions(
            ranges=options.ranges,
            zero_offset=options.zero_offset,
            concat_scales=options.concat_scales,
            step_bins=_step_bins(options, calibration.timestep, checkpoint.spec.num_train_timesteps),
            weight_bits=options.weight_bits,
        ),
        factors=factors,
        provenance={"weights_sha256": checkpoint.weights_sha256},
        progress=progress,
    )


def _check_modelopt(source: str) -> None:
    """Refuse before any work what ``_modelopt_plan`` could not do."""
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


def _check_keep_fp(options: BuildOptions, topology: Topology) -> None:
    from qdm_calibration.budget import check_choice

    if options.keep_fp is not None:
        check_choice(options.keep_fp, topology)


def _within_budget(
    options: BuildOptions,
    checkpoint: "Checkpoint",
    calibration: CalibrationSet,
    plan: QuantizationPlan,
    progress: Progress,
) -> QuantizationPlan:
    """The plan with the layers of ``keep_fp`` in float; measured only where the choice needs it."""
    from qdm_calibration.budget import keep_float, needs_sensitivity
    from qdm_calibration.sensitivity import measure_sensitivity

    choice = options.keep_fp or ""
    if not needs_sensitivity(choice):
        return keep_float(plan, choice)
    # Relative to the signal of each timestep: the verdict counts decibels, not absolute noise.
    sensitivity = measure_sensitivity(checkpoint.unet, plan, calibration, progress=progress).relative()
    return keep_float(plan, choice, sensitivity, min_sqnr_db=options.min_eps_sqnr_db)


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


def _step_bins(options: BuildOptions, timesteps: NDArray[np.int64], num_train_timesteps: int) -> int:
    """Bins as asked for, or the default, or as many as these timesteps can tell apart."""
    from qdm_calibration.plan import check_step_bins
    from qdm_calibration.statistics import timestep_edges

    edges = timestep_edges(timesteps, num_train_timesteps)
    if options.step_bins is not None:
        check_step_bins(edges, options.step_bins)
        return options.step_bins
    for bins in range(_DEFAULT_STEP_BINS, 1, -1):
        try:
            check_step_bins(edges, bins)
        except InputError:
            continue
        return bins
    return 1


def _sampling(options: BuildOptions) -> "SamplingPlan":
    from qdm_calibration.timesteps import SamplingPlan

    return SamplingPlan(
        strategy=options.strategy,
        samples=options.calibration_samples,
        steps=options.calibration_steps,
        count=options.ndtc_count,
        mean=options.ndtc_mean,
        spread=options.ndtc_spread,
    )


def _renamed(states: Mapping[str, NDArray[Any]] | None, name: str) -> dict[str, NDArray[Any]]:
    return {_STATES: states[name]} if states is not None and name in states else {}


def _check_fits(calibration: CalibrationSet, checkpoint: "Checkpoint", path: Path) -> None:
    spec = checkpoint.spec
    made_from = calibration.provenance.get("weights_sha256")
    if made_from is not None and made_from != checkpoint.weights_sha256:
        raise InputError(
            f"{path} was sampled from other weights than those of {checkpoint.source}; leave --calibration out"
        )
    if calibration.sample.shape[1:] != spec.sample_shape:
        raise InputError(
            f"{path} has samples of shape {calibration.sample.shape[1:]}; {spec.name} takes {spec.sample_shape}"
        )
    names = {item.name for item in spec.conditioning}
    if set(calibration.conditioning) != names:
        raise InputError(
            f"{path} has the conditioning {sorted(calibration.conditioning)}; {spec.name} takes {sorted(names)}"
        )
    if int(calibration.timestep.min()) < 0 or int(calibration.timestep.max()) >= spec.num_train_timesteps:
        raise InputError(
            f"{path} has timesteps outside 0 to {spec.num_train_timesteps - 1}, which {spec.name} was trained with"
        )
