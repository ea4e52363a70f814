"""Which layers of a plan stay in float, by the noise of each, and what the report says about the rest."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qdm_deploy.artifacts.calibration_set import CalibrationSet
from qdm_deploy.artifacts.plan import QuantizationPlan, Target
from qdm_deploy.artifacts.recipe import Recipe
from qdm_deploy.artifacts.topology import Topology
from qdm_deploy.building.layer_times import LayerTimer, LayerTimes, can_be_timed
from qdm_deploy.errors import InputError
from qdm_deploy.progress import SILENT, Progress
from qdm_deploy.report.sensitivity import FrontierRow, NoiseBlock

if TYPE_CHECKING:
    from torch import nn

    from qdm_calibration.sensitivity import Sensitivity

__all__ = ["Budgeted", "check_float_layers", "choose_float_layers"]

# A choice needs more than a page that shows shares.
_ROWS_TO_CHOOSE, _ROWS_TO_SHOW = 12, 8
# "N%time" is kept to by the clock: so many plans are tried, and so much of a step is what the clock may be wrong by.
_TRIALS, _CLOCK = 4, 0.01


@dataclass(frozen=True)
class Budgeted:
    """A plan with some layers in float, and what was measured on the way.

    Attributes:
        plan: the plan.
        noise: for the report; None where nothing was measured.
        shares: part of the noise that each layer adds, by layer.
        warnings: what was asked for and not reached.
    """

    plan: QuantizationPlan
    noise: NoiseBlock | None = None
    shares: dict[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def check_float_layers(recipe: Recipe, topology: Topology, targets: tuple[Target, ...]) -> None:
    """Refuse, before any calibration, rules and choices of layers that mean nothing for this network.

    Raises:
        InputError: see ``qdm_calibration.budget``; or the choice needs times that nothing here can tell.
    """
    from qdm_calibration.budget import check_choice, check_rules, needs_times

    check_rules(recipe, topology)
    check_choice(recipe.keep_fp, topology)
    if needs_times(recipe.keep_fp) and not can_be_timed(targets):
        raise _no_times(recipe.keep_fp)


def _no_times(choice: str) -> InputError:
    percent = choice.removesuffix("time")
    return InputError(
        f'keep_fp = "{choice}" needs the times of single layers, which only OpenVINO tells, for models of up to 268 '
        f"million weights: install it (pip install 'qdm-deploy[openvino]') and keep it among the targets, or give "
        f"{percent}, a part of the multiply-accumulates"
    )


def choose_float_layers(
    recipe: Recipe,
    network: "nn.Module",
    plan: QuantizationPlan,
    calibration: CalibrationSet,
    *,
    min_sqnr_db: float,
    timer: LayerTimer | None = None,
    progress: Progress = SILENT,
) -> Budgeted:
    """Apply the recipe's layer rules, measure each INT8 layer's noise where that is wanted, and apply ``keep_fp``.

    Args:
        recipe: its rules, ``keep_fp`` and ``sensitivity``.
        network: the float network.
        plan: every layer that may be INT8 is.
        calibration: what the noise is measured on.
        min_sqnr_db: what "auto" goes for.
        timer: measures what the plan's layers take; None: that is not known.
        progress: where to report.
    """
    from qdm_calibration.budget import keep_float, keep_ruled, needs_sensitivity, needs_times, percentage, pinned_layers
    from qdm_calibration.sensitivity import measure_sensitivity

    choice, plan, pinned = recipe.keep_fp, keep_ruled(plan, recipe), pinned_layers(plan, recipe)
    decides = needs_sensitivity(choice)
    if not plan.quantized or not (decides or recipe.sensitivity):
        chosen = keep_float(plan, choice, pinned=pinned)
        return Budgeted(chosen, warnings=_nothing_left(plan, chosen, choice))
    rows = _ROWS_TO_CHOOSE if decides else _ROWS_TO_SHOW
    # Relative to the noise of each timestep: the verdict counts decibels, not absolute noise.
    found = measure_sensitivity(network, plan, calibration, rows=rows, progress=progress).balanced()
    times = None if timer is None else timer.layer_times(plan)
    unmet: tuple[str, ...] = ()
    if needs_times(choice):
        if timer is None or times is None:
            raise _no_times(choice)
        chosen, unmet = _keep_to_time(percentage(choice), plan, found, times, timer, pinned)
    else:
        chosen = keep_float(plan, choice, found, min_sqnr_db=min_sqnr_db, pinned=pinned)
    left = {layer.name for layer in chosen.quantized}
    kept = frozenset(name for name in found.layers if name not in left)
    noise = _noise_block(found, kept, min(rows, len(calibration)), times)
    if choice == "auto":
        unmet = _unmet(noise, min_sqnr_db)
    warnings = unmet + _nothing_left(plan, chosen, choice)
    return Budgeted(chosen, noise, found.shares(), warnings)


def _keep_to_time(
    percent: float,
    plan: QuantizationPlan,
    found: "Sensitivity",
    times: LayerTimes,
    timer: LayerTimer,
    pinned: frozenset[str],
) -> tuple[QuantizationPlan, tuple[str, ...]]:
    """The plan with its noisiest layers in float whose step takes at most ``percent`` longer, and what was not reached.

    A layer in float also changes what its neighbours take, which no sum over layers knows. So the graph itself is
    timed, and fewer layers are kept where it takes longer than asked; none, if that goes on.
    """
    from qdm_calibration.budget import keep_float

    budget, why = percent, "every layer takes more"
    for _ in range(_TRIALS):
        kept = keep_float(plan, f"{budget}%time", found, step_ms=times.step_ms, extra_ms=times.extra_ms, pinned=pinned)
        layers = len(plan.quantized) - len(kept.quantized)
        if not layers:
            break
        longer = timer.longer(plan, kept)
        tried = f"with {layers} layer{'' if layers == 1 else 's'} in float a step takes {longer:+.1%}"
        timer.progress.say(f"{tried}; {percent:g}% more was asked for")
        if longer <= percent / 100 + _CLOCK:
            return kept, ()
        budget *= 0.9 * percent / (100 * longer)
        why = f"{tried}, and fewer do not help"
    return plan, (
        f'keep_fp = "{percent:g}%time" keeps no layer ({times.measured_on}): {why}; give more time, or names',
    )


def _noise_block(found: "Sensitivity", kept: frozenset[str], rows: int, times: LayerTimes | None) -> NoiseBlock:
    from qdm_calibration.budget import frontier

    points = frontier(found) if times is None else frontier(found, step_ms=times.step_ms, extra_ms=times.extra_ms)
    whole = float(found.mean_noise.sum())
    macs = dict(zip(found.layers, found.macs.tolist(), strict=True))
    return NoiseBlock(
        rows=rows,
        timesteps=len(found.timesteps),
        frontier=tuple(
            FrontierRow(
                layer=point.layer,
                int8_share=point.int8_share,
                noise_share=min(1.0, point.noise / whole),
                sqnr_db=point.sqnr_db,
                step_ms=point.step_ms,
            )
            for point in points
        ),
        kept=len(kept),
        sqnr_db=found.sqnr_db(kept),
        int8_share=sum(macs[name] for name in found.layers if name not in kept) / sum(macs.values()),
        step_ms=None if times is None else times.step_ms + sum(times.extra_ms[name] for name in kept),
        timed_on=None if times is None else times.measured_on,
    )


def _nothing_left(plan: QuantizationPlan, chosen: QuantizationPlan, choice: str) -> tuple[str, ...]:
    """What to say where a choice left no layer in INT8."""
    if chosen.quantized or not plan.quantized:
        return ()
    return (
        f'keep_fp = "{choice}" keeps all {len(plan.quantized)} layers in float: nothing of this bundle runs in INT8',
    )


def _unmet(noise: NoiseBlock, minimum: float) -> tuple[str, ...]:
    """What to say where "auto" ended at its limit and not at its target."""
    from qdm_calibration.budget import MAX_FLOAT_SHARE

    if noise.sqnr_db is None or noise.sqnr_db >= minimum:
        return ()
    layers = f"{noise.kept} layer{'' if noise.kept == 1 else 's'}"
    message = (
        f'keep_fp = "auto" did not reach its target: with {layers} ({1 - noise.int8_share:.1%} of the '
        f"multiply-accumulates) in float the predicted SQNR of the model's output is {noise.sqnr_db:.1f} dB, and "
        f"{minimum:g} dB was asked for. It keeps {MAX_FLOAT_SHARE:.0%} at most; give keep_fp N% or names to keep "
        "more."
    )
    return (message,)
