"""Which layers to keep in float, given how much noise each adds and what it costs to leave INT8."""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase

from qdm_calibration.sensitivity import Sensitivity
from qdm_deploy.artifacts.plan import LayerPlan, QuantizationPlan
from qdm_deploy.artifacts.recipe import Recipe
from qdm_deploy.artifacts.topology import Topology
from qdm_deploy.errors import InputError

__all__ = [
    "MAX_FLOAT_SHARE",
    "FrontierPoint",
    "check_choice",
    "check_rules",
    "frontier",
    "keep_float",
    "keep_ruled",
    "needs_sensitivity",
    "needs_times",
    "percentage",
    "pinned_layers",
]

# Part of the cost that "auto" may take out of INT8 to reach a target: more would give back what INT8 is for.
MAX_FLOAT_SHARE = 0.1
# "auto" takes bargains whatever the target: layers whose part of the noise, in the mean or at the worst timestep, is
# at least six times their part of the cost, up to this part of the cost. In U-Nets these are shortcuts, which are cheap
# and read what nothing normalizes, and the first block's convolution, which makes half the noise of the last step.
BARGAIN_SHARE, BARGAIN = 0.04, 6.0
_PERCENT, _TIME = re.compile(r"([^,]*)%"), re.compile(r"([^,]*)%time")


@dataclass(frozen=True)
class FrontierPoint:
    """What one more layer in float gives.

    Attributes:
        layer: the layer that goes float at this point; None for the plan as it is.
        int8_share: part of the planned INT8 cost that still runs in INT8, 0 to 1.
        noise: predicted noise power of the output, in the sensitivity's weighting.
        sqnr_db: predicted SQNR of the output in dB, mean over the timesteps.
        step_ms: predicted time of a step in milliseconds; None where no times were given.
    """

    layer: str | None
    int8_share: float
    noise: float
    sqnr_db: float
    step_ms: float | None = None


def needs_sensitivity(choice: str) -> bool:
    """Whether a choice needs the noise of the layers: "auto", "N%" and "N%time" do, "none" and names do not."""
    return choice == "auto" or _PERCENT.fullmatch(choice) is not None or needs_times(choice)


def needs_times(choice: str) -> bool:
    """Whether a choice needs the measured times of the layers: "N%time" does."""
    return _TIME.fullmatch(choice) is not None


def check_choice(choice: str, topology: Topology) -> None:
    """Refuse, before any calibration, a choice that cannot be kept.

    Raises:
        InputError: a percentage outside 0 to 100, or a name or pattern that fits no layer that may become INT8.
    """
    if choice in ("auto", "none"):
        return
    if needs_sensitivity(choice):
        percentage(choice)
    else:
        _named(choice, [layer.name for layer in topology.candidates])


def check_rules(recipe: Recipe, topology: Topology) -> None:
    """Refuse layer rules that fit no layer, or give layers that read one tensor different grids for it.

    Raises:
        InputError: with the rule, and the layers it might have meant.
    """
    names = [layer.name for layer in topology.candidates]
    for number, rule in enumerate(recipe.layers):
        if not any(fnmatchcase(name, rule.match) for name in names):
            raise InputError(
                f"layers[{number}].match = {rule.match!r} fits no layer that may be INT8 "
                f"({_closest(rule.match, names)}); `qdm-deploy inspect` lists a bundle's layers"
            )
    for layers in topology.groups().values():
        found = {layer.name: recipe.layer(layer.name) for layer in layers}
        if len({(choice.ranges, choice.zero_offset, choice.channel_factors) for choice in found.values()}) > 1:
            raise InputError(
                f"{', '.join(found)} read one tensor, so it has one grid, and the layer rules give them different "
                "ranges, zero_offset or channel_factors; give them the same"
            )


def keep_ruled(plan: QuantizationPlan, recipe: Recipe) -> QuantizationPlan:
    """The plan with those INT8 layers in float that a layer rule puts there."""
    ruled = [item.name for item in plan.quantized if recipe.layer(item.name).precision == "float"]
    return _with_float(plan, dict.fromkeys(ruled, "kept in float: by a layer rule of the recipe"))


def pinned_layers(plan: QuantizationPlan, recipe: Recipe) -> frozenset[str]:
    """INT8 layers that a layer rule keeps in INT8, whatever ``keep_fp`` says."""
    return frozenset(item.name for item in plan.quantized if recipe.layer(item.name).precision == "int8")


def percentage(choice: str) -> float:
    """N of "N%" and of "N%time".

    Raises:
        InputError: it is no number from 0 to 100.
    """
    of_time = needs_times(choice)
    try:
        value = float(choice.removesuffix("%time" if of_time else "%"))
    except ValueError:
        value = -1.0
    if not 0 <= value <= 100:
        what = "a step's time cannot be added by layers" if of_time else "the INT8 cost cannot be kept"
        end = "time" if of_time else ""
        raise InputError(f"{choice!r} of {what} in float; give a percentage from 0%{end} to 100%{end}")
    return value


def keep_float(
    plan: QuantizationPlan,
    choice: str,
    sensitivity: Sensitivity | None = None,
    cost: Mapping[str, float] | None = None,
    *,
    step_ms: float | None = None,
    extra_ms: Mapping[str, float] | None = None,
    min_sqnr_db: float = 25.0,
    max_float_share: float = MAX_FLOAT_SHARE,
    pinned: Collection[str] = (),
) -> QuantizationPlan:
    """The plan with some of its INT8 layers kept in float, each with its reason.

    Args:
        plan: every layer that may be INT8 is.
        choice: "auto" (bargains, and what it takes to reach ``min_sqnr_db``), "N%" (as much noise as N percent of the
            cost can remove), "N%time" (as much as it can while a step takes at most N percent longer), "none", or names
            and patterns (``*``, ``?``, ``[...]``) separated by commas.
        sensitivity: of this plan; needed for "auto", "N%" and "N%time".
        cost: of each layer in INT8, in any unit; None takes its multiply-accumulates.
        step_ms: milliseconds of a step of this plan; needed for "N%time".
        extra_ms: milliseconds that a layer adds to a step in float, by layer; needed for "N%time".
        min_sqnr_db: "auto" goes on until the predicted SQNR of the output reaches this.
        max_float_share: "auto" keeps no more than this part of the cost in float.
        pinned: layers that stay in INT8 whatever the choice is.

    Raises:
        InputError: a name that fits no INT8 layer, a percentage outside 0 to 100.
        ValueError: no sensitivity, or no times, where the choice needs them.
    """
    names = [layer.name for layer in plan.quantized]
    if choice == "none":
        return plan
    if not needs_sensitivity(choice):
        asked = [name for name in _named(choice, names) if name not in pinned]
        return _with_float(plan, dict.fromkeys(asked, "kept in float: asked for by name"))
    if sensitivity is None:
        raise ValueError(f"keeping {choice!r} in float needs the sensitivity of the layers")
    costs = _costs(sensitivity, cost)
    shares, worst = sensitivity.shares(), sensitivity.worst_shares()
    if choice == "auto":
        largest = {name: max(shares[name], worst[name]) for name in sensitivity.layers}
        share = min(BARGAIN_SHARE, max_float_share)
        bargains = _within(sensitivity, costs, share, pinned=pinned, noise=largest, least_ratio=BARGAIN)
        kept = _within(sensitivity, costs, max_float_share, bargains, pinned=pinned, min_sqnr_db=min_sqnr_db)
    elif needs_times(choice):
        if step_ms is None or extra_ms is None:
            raise ValueError(f"keeping {choice!r} in float needs the times of the layers")
        # What INT8 makes no faster costs next to nothing to keep in float, and goes first.
        costs = {name: max(extra_ms[name], 1e-6 * step_ms) for name in sensitivity.layers}
        kept = _within(sensitivity, costs, percentage(choice) / 100 * step_ms / sum(costs.values()), pinned=pinned)
    else:
        kept = _within(sensitivity, costs, percentage(choice) / 100, pinned=pinned)
    return _with_float(plan, {name: _reason(shares[name], worst[name]) for name in kept})


def frontier(
    sensitivity: Sensitivity,
    cost: Mapping[str, float] | None = None,
    *,
    step_ms: float | None = None,
    extra_ms: Mapping[str, float] | None = None,
) -> tuple[FrontierPoint, ...]:
    """What is predicted when the layers go float one after the other, the one that adds most noise first.

    It starts with the plan as it is and ends before no noise is left. Arguments as those of ``keep_float``.
    """
    costs = _costs(sensitivity, cost)
    total = sum(costs.values())
    noise = dict(zip(sensitivity.layers, sensitivity.mean_noise.tolist(), strict=True))
    points: list[FrontierPoint] = []
    kept: set[str] = set()
    for layer in (None, *sensitivity.ranked()):
        kept |= set() if layer is None else {layer}
        sqnr = sensitivity.sqnr_db(kept)
        if sqnr is None:
            break
        left = [name for name in sensitivity.layers if name not in kept]
        share = sum(costs[name] for name in left) / total
        longer = None if step_ms is None or extra_ms is None else step_ms + sum(extra_ms[name] for name in kept)
        points.append(FrontierPoint(layer, share, sum(noise[name] for name in left), sqnr, longer))
    return tuple(points)


def _within(
    sensitivity: Sensitivity,
    costs: Mapping[str, float],
    share: float,
    kept: Sequence[str] = (),
    *,
    pinned: Collection[str],
    noise: Mapping[str, float] | None = None,
    least_ratio: float = 0.0,
    min_sqnr_db: float = math.inf,
) -> list[str]:
    """``kept`` and more layers, by noise removed per cost; one that would break the limit is passed over.

    ``noise`` is each layer's part; None takes the parts of the mean noise. It ends at layers whose part of the noise is
    less than ``least_ratio`` times their part of the cost, and where the predicted SQNR reaches ``min_sqnr_db``.
    """
    noise, whole = noise or sensitivity.shares(), sum(costs.values())
    ratio = {name: noise[name] * whole / costs[name] for name in sensitivity.layers}
    # The hair is for a share of 100 %, whose sum may round up.
    left = share * whole * (1 + 1e-9) - sum(costs[name] for name in kept)
    chosen = list(kept)
    for name in sorted(set(sensitivity.layers) - set(kept) - set(pinned), key=lambda name: (-ratio[name], name)):
        predicted = sensitivity.sqnr_db(set(chosen))
        if ratio[name] < least_ratio or predicted is None or predicted >= min_sqnr_db:
            break
        if costs[name] <= left:
            left -= costs[name]
            chosen.append(name)
    return chosen


def _costs(sensitivity: Sensitivity, cost: Mapping[str, float] | None) -> dict[str, float]:
    if cost is None:
        return dict(zip(sensitivity.layers, map(float, sensitivity.macs), strict=True))
    bad = [name for name in sensitivity.layers if not cost.get(name, 0.0) > 0]
    if bad:
        raise InputError(f"{len(bad)} INT8 layers have no cost above 0 (first: {bad[0]}); give one for each layer")
    return {name: cost[name] for name in sensitivity.layers}


def _named(choice: str, names: list[str]) -> list[str]:
    """The layers that the comma-separated names and patterns mean."""
    found: set[str] = set()
    for pattern in (part.strip() for part in choice.split(",")):
        matches = [name for name in names if fnmatchcase(name, pattern)]
        if not matches:
            raise InputError(
                f"{pattern!r} is no INT8 layer to keep in float ({_closest(pattern, names)}); give 'auto', 'none', "
                "'N%', 'N%time', or names or patterns of the layers that `qdm-deploy inspect` lists"
            )
        found.update(matches)
    return [name for name in names if name in found]


def _closest(pattern: str, names: list[str]) -> str:
    close = get_close_matches(pattern, names, n=3)
    return f"close to it: {', '.join(close)}" if close else f"one of them is {names[0]}" if names else "none is"


def _reason(share: float, worst: float) -> str:
    text = f"kept in float: adds {_percent(share)} of the noise"
    return text + (f", {_percent(worst)} at the worst timestep" if worst > 2 * share else "")


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else "less than 1%"


def _with_float(plan: QuantizationPlan, reasons: Mapping[str, str]) -> QuantizationPlan:
    layers = tuple(
        LayerPlan(item.layer, "float", reason=reasons[item.name]) if item.name in reasons else item
        for item in plan.layers
    )
    return replace(plan, layers=layers)
