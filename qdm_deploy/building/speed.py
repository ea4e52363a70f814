"""Time per step, float against INT8, on the backends this machine has."""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from qdm_deploy.artifacts.pipeline_spec import Denoiser
from qdm_deploy.progress import SILENT, Progress
from qdm_deploy.report.model import SpeedRow
from qdm_deploy.runtime import StepSession
from qdm_deploy.runtime.timing import runs_in_all, timed_in_turn
from qdm_deploy.samplers.random_inputs import random_inputs

__all__ = ["measure_speed", "speedup_of"]


def measure_speed(
    sessions: Mapping[tuple[str, Literal["int8", "float"]], StepSession],
    denoiser: Denoiser,
    batches: Sequence[int],
    *,
    runs: int = 10,
    seconds: float = 60.0,
    progress: Progress = SILENT,
) -> tuple[SpeedRow, ...]:
    """Median and 95th percentile of one step for every session and batch size, timed in turn, round after round.

    Args:
        sessions: what to time, by backend and precision.
        denoiser: what they run.
        batches: numbers of rows, in rising order.
        runs: steps that count, of each session at each batch size.
        seconds: what a batch size may take; fewer steps count where it would take longer, and a batch size is left out
            where one step of each session would (the first batch size is always measured).
        progress: where to report.
    """
    rows: list[SpeedRow] = []
    with progress.task("Measuring speed", len(batches) * runs_in_all(runs) * len(sessions)) as advance:
        last: dict[tuple[str, Literal["int8", "float"]], list[float]] = {}
        for before, batch in zip((0, *batches), batches, strict=False):
            # Each session prepares the batch size with a step that does not count.
            expected = 2 * sum(map(min, last.values())) / 1000 * batch / max(before, 1)
            if expected > seconds:
                progress.say(f"Batch {batch} is not timed: a step of each would take some {expected:.0f} s")
                break
            last = timed_in_turn(sessions, random_inputs(denoiser, batch), runs=runs, seconds=seconds, advance=advance)
            for (backend, precision), values in last.items():
                rows.append(
                    SpeedRow(
                        backend=backend,
                        precision=precision,
                        batch=batch,
                        median_ms=float(np.median(values)),
                        p95_ms=float(np.percentile(values, 95)),
                        runs=len(values),
                    )
                )
    return tuple(rows)


def speedup_of(rows: Sequence[SpeedRow], backend: str, batch: int) -> float | None:
    """Float time over INT8 time on ``backend``; None where one of them was not measured."""
    median = {row.precision: row.median_ms for row in rows if row.backend == backend and row.batch == batch}
    return median["float"] / median["int8"] if len(median) == 2 else None
