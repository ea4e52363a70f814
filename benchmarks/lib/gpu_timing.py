"""Times of one session, whatever it runs on: single steps, loops of steps, and what mixed timesteps cost."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from qdm_deploy.artifacts.pipeline_spec import Denoiser
from qdm_deploy.runtime.session import StepInputs, StepLoop, StepSession
from qdm_deploy.samplers.random_inputs import random_inputs

_WARM_UP = 5
_STEPS = 50


def run_ms(session: StepSession, model: Denoiser, batch: int, runs: int) -> dict[str, float]:
    """One step with everything copied to the GPU and back: median and 95th percentile in milliseconds."""
    inputs = random_inputs(model, batch)
    return timed(lambda: session.run(inputs), runs)


def loop_ms(session: StepLoop, model: Denoiser, batch: int, runs: int) -> dict[str, float]:
    """One step of a 50-step loop whose state stays on the GPU; ``runs`` steps or more are timed."""
    inputs = random_inputs(model, batch)
    steps = [StepInputs(inputs["timestep"], inputs["coefficients"], None)] * _STEPS
    return timed(lambda: session.run_steps(inputs, steps), max(3, runs // _STEPS), warm_up=1, steps=_STEPS)


def mixed_rows(session: StepSession, model: Denoiser, batch: int, runs: int) -> dict[str, Any]:
    """A batch whose rows are at different timesteps beside one at a single timestep: time, and the rows' distance.

    ``largest_difference`` is between a row in the mixed batch and the same row in a batch of its own timestep, relative
    to the largest value: 0 where a row does not depend on its neighbours.
    """
    mixed = random_inputs(model, batch)
    mixed["timestep"] = np.linspace(0, model.num_train_timesteps - 1, batch).astype(np.int64)
    together = session.run(mixed).next_sample.copy()
    worst = 0.0
    for row in range(batch):
        alike = {**mixed, "timestep": np.full_like(mixed["timestep"], mixed["timestep"][row])}
        worst = max(worst, float(np.abs(session.run(alike).next_sample[row] - together[row]).max()))
    same = {**mixed, "timestep": np.full_like(mixed["timestep"], model.num_train_timesteps // 2)}
    return {
        "mixed": timed(lambda: session.run(mixed), runs),
        "same": timed(lambda: session.run(same), runs),
        "largest_difference": worst / float(np.abs(together).max()),
    }


def timed(work: Callable[[], object], runs: int, *, warm_up: int = _WARM_UP, steps: int = 1) -> dict[str, float]:
    """Milliseconds of ``work``, or of each of its ``steps``: median and 95th percentile of ``runs`` after a warm-up."""
    times = []
    for run in range(runs + warm_up):
        start = time.perf_counter()
        work()
        if run >= warm_up:
            times.append(1000 * (time.perf_counter() - start) / steps)
    return {"median": float(np.median(times)), "p95": float(np.percentile(times, 95)), "runs": len(times)}
