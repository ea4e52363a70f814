"""SHIP or DO NOT SHIP, from measured values and thresholds; what was asked for and not measured is a problem."""

import math
from collections.abc import Sequence

from qdm_deploy.report.model import CheckRow, EngineRow, QualityRow, Thresholds, Verdict

__all__ = ["decide"]


def decide(
    *,
    quality: Sequence[QualityRow],
    speedup: float | None,
    engines: Sequence[EngineRow],
    checks: Sequence[CheckRow],
    thresholds: Thresholds,
) -> Verdict:
    """Judge a build; every argument is the ``Report`` field of that name.

    It ships when all checks hold, every engine runs all planned layers in INT8, every measured target reaches both
    quality thresholds (latents: the one on the model's output), and the speed-up is large enough. Quality and speed
    that were not measured count as problems; a ``min_speedup`` of 0 asks for no speed. No engine is no problem.

    Returns:
        The verdict with one sentence for each reason. Numbers are rounded down, so that none is shown as large as a
        threshold that it misses.
    """
    problems: list[str] = []
    merits: list[str] = []

    def judge(good: bool, sentence: str) -> None:
        (merits if good else problems).append(sentence)

    failed = [check for check in checks if not check.ok]
    for check in failed:
        judge(False, f"The check “{check.name}” failed: {check.detail}")
    if not checks:
        judge(False, "No check was run, so the bundle's integrity is unknown.")
    elif not failed:
        judge(True, f"All {len(checks)} checks hold." if len(checks) > 1 else f"The check “{checks[0].name}” holds.")

    if not quality:
        judge(False, "Quality was not measured, so it cannot be judged.")
    for row in quality:
        judge(*_images(row, thresholds.min_psnr_db))
        judge(*_output(row, thresholds.min_eps_sqnr_db))

    judge(*_speed(speedup, thresholds.min_speedup))
    for engine in engines:
        judge(*_engine(engine))
    return Verdict(ship=not problems, problems=tuple(problems), merits=tuple(merits), thresholds=thresholds)


def _images(row: QualityRow, threshold: float) -> tuple[bool, str]:
    mean, worst = row.psnr_mean_db, row.psnr_min_db
    if mean is None or worst is None:
        return True, f"{row.label}: the samples are latents, so the model's output alone is judged."
    if threshold == 0:
        return True, f"{row.label}: the images have a mean PSNR of {_down(mean)} dB, and none was asked for."
    good = mean >= threshold
    return good, (
        f"{row.label}: the images have a mean PSNR of {_down(mean)} dB ({_required(good, threshold)}; "
        f"worst of {row.samples}: {_down(worst)})."
    )


def _output(row: QualityRow, threshold: float) -> tuple[bool, str]:
    good = row.eps_sqnr_mean_db >= threshold
    return good, (
        f"{row.label}: the model's output has a mean SQNR of {_down(row.eps_sqnr_mean_db)} dB "
        f"({_required(good, threshold)}; worst step, timestep {row.worst_timestep}: {_down(row.eps_sqnr_min_db)})."
    )


def _speed(speedup: float | None, threshold: float) -> tuple[bool, str]:
    if speedup is None:
        unknown = "The speed was not compared with the float graph's"
        if threshold == 0:
            return True, f"{unknown}, and no speed-up was asked for."
        return False, f"{unknown}, so the required speed-up of {threshold:.2f} cannot be judged."
    good = speedup >= threshold
    return good, f"INT8 runs {_down(speedup)} times as fast as float ({_required(good, threshold)})."


def _engine(engine: EngineRow) -> tuple[bool, str]:
    name = f"The {engine.backend} engine for SM {engine.sm}"
    if engine.clean:
        return True, f"{name} runs all {engine.planned} planned layers in INT8."
    if engine.planned == 0:
        return False, f"{name} has no layer that is planned in INT8."
    first = f" First: {engine.failures[0]}" if engine.failures else ""
    return False, f"{name} runs {engine.int8} of {engine.planned} planned layers in INT8.{first}"


def _required(good: bool, threshold: float) -> str:
    return f"{'' if good else 'too low, '}required: {threshold:.2f}"


def _down(value: float) -> str:
    return f"{math.floor(value * 100) / 100:.2f}"
