"""Calibration inside a build; whatever can be refused is refused before the first long stage."""

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from qdm_deploy.artifacts.calibration_set import CalibrationSet
from qdm_deploy.artifacts.plan import QuantizationPlan
from qdm_deploy.building.float_layers import Budgeted, check_float_layers
from qdm_deploy.building.layer_times import LayerTimer
from qdm_deploy.building.options import BuildOptions
from qdm_deploy.building.planning import make_plan
from qdm_deploy.components.conditioning import conditioning_of, read_hidden_states
from qdm_deploy.errors import InputError
from qdm_deploy.progress import Progress
from qdm_deploy.report.ranges import InputRanges, input_ranges
from qdm_deploy.samplers import NoiseSchedule, StepTable

if TYPE_CHECKING:
    import onnx_ir as ir

    from qdm_calibration.importance import StepImportance
    from qdm_export.unet import Checkpoint

__all__ = ["Calibrated", "calibrate", "read_calibration"]

_STATES, _NULL_STATES = "encoder_hidden_states", "unconditional_hidden_states"


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


def read_calibration(options: BuildOptions, checkpoint: "Checkpoint", table: StepTable) -> CalibrationSet | None:
    """The calibration set the user gave, if any, after refusing all that cannot end well.

    Raises:
        InputError: the set does not fit the model, conditioning is missing, or there are more step bins than the
            calibration can tell apart.
    """
    from qdm_calibration.collect import conditioning_rows, unconditional_rows
    from qdm_calibration.statistics import timestep_edges
    from qdm_calibration.step_bins import check_step_bins
    from qdm_calibration.timesteps import sampling_plan

    recipe = options.recipe
    _check_modelopt(recipe.from_modelopt)
    spec = checkpoint.spec
    states = read_hidden_states(options.conditioning_file)
    conditioning_of(spec, options.verify_samples, hidden_states=states)
    if options.guidance != 1.0:
        unconditional_rows(spec, 1, _renamed(states, _NULL_STATES))
    if options.calibration_file is None:
        conditioning_rows(spec, recipe.calibration.samples, _renamed(states, _STATES))
        draw = sampling_plan(recipe.calibration, table, spec.num_train_timesteps, options.seed)
        given, timesteps = None, table.timesteps[draw.step]
    else:
        given = CalibrationSet.load(options.calibration_file)
        _check_fits(given, checkpoint, options.calibration_file)
        timesteps = given.timestep
    check_step_bins(timestep_edges(timesteps, spec.num_train_timesteps), recipe.activations.step_bins)
    return given


def _check_modelopt(source: str) -> None:
    """Refuse before any work a ModelOpt source that cannot be used."""
    from qdm_calibration.modelopt import CONFIGS, read_quantizer_state, require_modelopt

    if source in CONFIGS:
        require_modelopt()
    elif source != "none":
        read_quantizer_state(Path(source))


def calibrate(
    options: BuildOptions,
    checkpoint: "Checkpoint",
    table: StepTable,
    given: CalibrationSet | None,
    float_graph: "ir.Model",
    stage: Callable[[str], AbstractContextManager[None]],
    progress: Progress,
) -> Calibrated:
    """Sample the calibration set unless one was given, measure every activation, and decide."""
    from qdm_calibration.collect import collect_calibration_set
    from qdm_calibration.statistics import collect_statistics
    from qdm_export.topology import topology_of

    spec = checkpoint.spec
    topology = topology_of(float_graph)
    check_float_layers(options.recipe, topology, options.targets)
    with stage("calibrate"):
        states = read_hidden_states(options.conditioning_file)
        calibration = given or collect_calibration_set(
            checkpoint.unet,
            spec,
            table,
            options.recipe.calibration,
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

    # At most once, and only where a choice depends on it.
    @functools.cache
    def importance() -> "StepImportance":
        return _importance(options, checkpoint, states, progress)

    budgeted = make_plan(
        options.recipe,
        checkpoint,
        topology,
        calibration,
        statistics,
        targets=options.targets,
        min_sqnr_db=options.min_eps_sqnr_db,
        seed=options.seed,
        # Beside the bundle: what an interrupted build has learned outlives its unfinished folder.
        folder=options.out.absolute().parent / f".{options.out.name}.reconstruction",
        importance=importance,
        stage=stage,
        timer=LayerTimer(options.targets, options.threads, float_graph, spec, progress),
        progress=progress,
    )
    return Calibrated(calibration, budgeted, input_ranges(statistics, budgeted.plan))


def _importance(
    options: BuildOptions,
    checkpoint: "Checkpoint",
    states: Mapping[str, NDArray[Any]] | None,
    progress: Progress,
) -> "StepImportance":
    """Over the sampler that the bundle is built for, on seeds of the calibration."""
    from qdm_calibration.importance import importance_table, measure_importance

    spec, schedule = checkpoint.spec, NoiseSchedule.from_config(checkpoint.scheduler_config)
    return measure_importance(
        checkpoint.unet,
        spec,
        importance_table(schedule, options.sampler, options.steps, learned_variance=spec.learned_variance),
        first_seed=options.seed,
        guidance=options.guidance,
        conditioning=_renamed(states, _STATES),
        unconditional=_renamed(states, _NULL_STATES),
        progress=progress,
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
