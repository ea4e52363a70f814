"""Inputs for timing and warming up a step graph: valid, and with no meaning."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.artifacts.model_spec import ModelSpec

__all__ = ["random_inputs"]


def random_inputs(model: ModelSpec, batch: int, seed: int = 0) -> dict[str, NDArray[Any]]:
    """Inputs of the step graph for ``batch`` rows, with a different timestep in each."""
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
