"""Inputs for timing, warming up and checking a step graph: valid, and with no meaning."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.artifacts.pipeline_spec import Denoiser
from qdm_deploy.samplers.columns import LEARNED_VARIANCE_COEFFICIENTS

__all__ = ["random_inputs"]

# Any step that mixes all of its operands, none of them by much.
_STEP = {
    "p": 1.0, "q": -0.3, "clip": 1.0, "a": 0.8, "b": 0.1, "g": 0.05, "c0": 0.1, "c1": -0.05, "c2": 0.02, "d": 0.1,
    "u": 0.7, "v": 0.2, "w": 0.1, "log_var_min": -9.0, "log_var_max": -8.0,
}  # fmt: skip


def random_inputs(denoiser: Denoiser, batch: int, seed: int = 0) -> dict[str, NDArray[Any]]:
    """Inputs of a denoiser's step graph for ``batch`` rows, with a different timestep in each.

    Whole numbers among the conditions are drawn below the denoiser's ``limits``.
    """
    generator = np.random.default_rng(seed)
    inputs = denoiser.interface.rows(batch)
    for spec in denoiser.interface:
        values = inputs[spec.name]
        if spec.name == "timestep":
            values[:] = generator.integers(0, denoiser.num_train_timesteps, batch)
        elif spec.name == "coefficients":
            values[:] = [_STEP[name] for name in LEARNED_VARIANCE_COEFFICIENTS[: values.shape[1]]]
        elif spec.role in ("state", "noise", "condition") and spec.dtype == "float32":
            values[:] = generator.standard_normal(values.shape, dtype=np.float32)
        elif spec.role == "condition":
            values[:] = generator.integers(0, denoiser.limits.get(spec.name, 1), values.shape)
    return inputs
