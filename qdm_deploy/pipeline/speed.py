"""Time per step, float against INT8, on the backends this machine has.

All sessions are timed in turn, round after round, so that a machine that changes its speed changes it for all of them.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.artifacts.model_spec import ModelSpec
from qdm_deploy.progress import SILENT, Progress
from qdm_deploy.report.model import SpeedRow
from qdm_deploy.runtime import StepSession

__all__ = ["measure_speed", "random_inputs", "speedup_of"]

_WARM_UP = 2


def random_inputs(model: ModelSpec, batch: int, seed: int = 0) -> dict[str, NDArray[Any]]:
    """Valid inputs of the step graph for ``batch`` rows, with a different timestep in each."""
    generator = np.random.default_rng(seed)
    shape = (batch, *model.sample_shape)
    inputs: dict[str, NDArray[Any]] = {
        "sample": generator.standard_normal(shape, dtype=np.float32),
        "timestep": generator.integers(0, model.num_train_timesteps, batch),
        "coefficients": np.tile(np.array([[1.0, -0.3, 1.0, 0.8, 0.1, 0.1, 0.1, -9.0, -8.0]], np.float32), (batch, 1)),
        "noise": generator.standard_normal(shape, dtype=np.float32),
        "previous_x0": generator.standard_normal(shape, dtype=np.float32),
    }
    inputs["coefficients"] = np.ascontiguousarray(inputs["coefficients"][:, : model.num_coefficients])
    for item in model.conditioning:
        if item.name == "class_labels":
            inputs[item.name] = generator.integers(0, model.num_classes or 1, batch)
        else:
            inputs[item.name] = generator.standard_normal((batch, *item.shape), dtype=np.float32)
    if model.conditional:
        inputs["guidance"] = np.ones(batch, dtype=np.float32)
        inputs["unconditional_row"] = np.arange(batch)
        inputs["owner_row"] = np.arange(batch)
    return inputs


def measure_speed(
    sessions: Mapping[tuple[str, Literal["int8", "float"]], StepSession],
    model: ModelSpec,
    batches: Sequence[int],
    *,
    runs: int = 10,
    progress: Progress = SILENT,
) -> tuple[SpeedRow, ...]:
    """Median and 95th percentile of one step for every session and batch size, timed in interleaved rounds."""
    rows = []
    with progress.task("Measuring speed", len(batches) * (runs + _WARM_UP) * len(sessions)) as advance:
        for batch in batches:
            inputs = random_inputs(model, batch)
            times: dict[tuple[str, Literal["int8", "float"]], list[float]] = {key: [] for key in sessions}
            for run in range(runs + _WARM_UP):
                for key, session in sessions.items():
                    start = time.perf_counter()
                    session.run(inputs)
                    if run >= _WARM_UP:
                        times[key].append(1000 * (time.perf_counter() - start))
                    advance()
            for (backend, precision), values in times.items():
                rows.append(
                    SpeedRow(
                        backend=backend,
                        precision=precision,
                        batch=batch,
                        median_ms=float(np.median(values)),
                        p95_ms=float(np.percentile(values, 95)),
                        runs=runs,
                    )
                )
    return tuple(rows)


def speedup_of(rows: Sequence[SpeedRow], backend: str, batch: int) -> float | None:
    """Float time over INT8 time on ``backend``; None where one of them was not measured."""
    median = {row.precision: row.median_ms for row in rows if row.backend == backend and row.batch == batch}
    return median["float"] / median["int8"] if len(median) == 2 else None
