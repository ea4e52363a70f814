"""The noise of each INT8 layer inside a build: which layers stay in float, and what the report says about the rest."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qdm_deploy.artifacts.calibration_set import CalibrationSet
from qdm_deploy.artifacts.plan import QuantizationPlan
from qdm_deploy.artifacts.topology import Topology
from qdm_deploy.pipeline.options import BuildOptions
from qdm_deploy.progress import Progress
from qdm_deploy.report.sensitivity import FrontierRow, NoiseBlock

if TYPE_CHECKING:
    from qdm_calibration.sensitivity import Sensitivity
    from qdm_export.unet import Checkpoint

__all__ = ["Budgeted", "check_keep_fp", "measured_and_kept"]

# A choice needs more than a page that shows shares.
_ROWS_TO_CHOOSE, _ROWS_TO_SHOW = 12, 8


@dataclass(frozen=True)
class Budgeted:
    """A plan with the layers of ``keep_fp`` in float, and what was measured on the way.

    Attributes:
        plan: the plan.
        noise: for the report; None where nothing was measured.
        shares: part of the noise that each layer adds, by layer.
        worst_shares: part of the noise at the worst timestep that each layer left in INT8 adds, by layer; empty where
            the choice of layers needed no measurement.
        warnings: what was asked for and not reached.
    """

    plan: QuantizationPlan
    noise: NoiseBlock | None = None
    shares: dict[str, float] = field(default_factory=dict)
    worst_shares: dict[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def check_keep_fp(options: BuildOptions, topology: Topology) -> None:
    """Refuse a choice of layers that cannot be kept.

    Raises:
        InputError: see ``qdm_calibration.budget.check_choice``.
    """
    from qdm_calibration.budget import check_choice

    check_choice(options.float_choice, topology)


def measured_and_kept(
    options: BuildOptions,
    checkpoint: "Checkpoint",
    calibration: CalibrationSet,
    plan: QuantizationPlan,
    progress: Progress,
) -> Budgeted:
    """Measure where that is wanted, on the plan with every INT8 layer in INT8, then apply ``keep_fp``."""
    from qdm_calibration.budget import keep_float, needs_sensitivity
    from qdm_calibration.sensitivity import measure_sensitivity

    choice = options.float_choice
    decides = needs_sensitivity(choice)
    if not plan.quantized or not (decides or options.sensitivity):
        return Budgeted(keep_float(plan, choice))
    rows = _ROWS_TO_CHOOSE if decides else _ROWS_TO_SHOW
    # Relative to the noise of each timestep: the verdict counts decibels, not absolute noise.
    found = measure_sensitivity(checkpoint.unet, plan, calibration, rows=rows, progress=progress).balanced()
    chosen = keep_float(plan, choice, found, min_sqnr_db=options.min_eps_sqnr_db)
    left = {layer.name for layer in chosen.quantized}
    kept = frozenset(name for name in found.layers if name not in left)
    noise = _noise_block(found, kept, min(rows, len(calibration)))
    warnings = _unmet(noise, options.min_eps_sqnr_db) if choice == "auto" else ()
    worst = found.without(kept).worst_shares() if decides and left else {}
    return Budgeted(chosen, noise, found.shares(), worst, warnings)


def _noise_block(found: "Sensitivity", kept: frozenset[str], rows: int) -> NoiseBlock:
    from qdm_calibration.budget import frontier

    points = frontier(found)
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
            )
            for point in points
        ),
        kept=len(kept),
        sqnr_db=found.sqnr_db(kept),
        int8_share=sum(macs[name] for name in found.layers if name not in kept) / sum(macs.values()),
    )


def _unmet(noise: NoiseBlock, minimum: float) -> tuple[str, ...]:
    """What to say where "auto" ended at its limit and not at its target."""
    from qdm_calibration.budget import MAX_FLOAT_SHARE

    if noise.sqnr_db is None or noise.sqnr_db >= minimum:
        return ()
    layers = f"{noise.kept} layer{'' if noise.kept == 1 else 's'}"
    message = (
        f"--keep-fp auto did not reach its target: with {layers} ({1 - noise.int8_share:.1%} of the "
        f"multiply-accumulates) in float the predicted SQNR of the model's output is {noise.sqnr_db:.1f} dB, and "
        f"{minimum:g} dB was asked for. It keeps {MAX_FLOAT_SHARE:.0%} at most; give --keep-fp N% or names to keep "
        "more."
    )
    return (message,)
