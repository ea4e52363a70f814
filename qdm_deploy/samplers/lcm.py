"""Latent consistency models (arXiv 2310.04378, algorithm 3): x0, blended with x by the boundary condition, and noised.

A step never looks at the direction in which the noise points: it goes to the clean image and back up to the next
timestep with fresh noise. The last step adds none.
"""

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.errors import InputError
from qdm_deploy.samplers.columns import NO_CLIP, StepColumns, levels_of
from qdm_deploy.samplers.run_options import RunOptions
from qdm_deploy.samplers.schedule import NoiseSchedule
from qdm_deploy.samplers.spacing import consistency_timesteps, given_timesteps

__all__ = ["distilled_timesteps", "lcm_columns"]

# The deviation of the data, eq. 9 of the paper's appendix.
_DATA_DEVIATION = 0.5


def lcm_columns(schedule: NoiseSchedule, run: RunOptions) -> StepColumns:
    """Columns of the LCM sampler.

    Args:
        schedule: Noise levels, clipping, ``original_inference_steps`` and ``timestep_scaling``.
        run: Number of steps or listed timesteps, original inference steps.

    Returns:
        Columns of [S].

    Raises:
        InputError: More steps than the model was distilled on, or more of those than there are timesteps.
    """
    if run.timesteps is None:
        original = run.original_inference_steps or schedule.solver.original_inference_steps
        timesteps = consistency_timesteps(schedule, run.steps, distilled_timesteps(schedule, original))
    else:
        timesteps = given_timesteps(schedule, run.timesteps, whole=True).astype(np.int64)
    level = schedule.alphas_cumprod[timesteps]
    scaled = timesteps * schedule.solver.timestep_scaling
    of_sample = _DATA_DEVIATION**2 / (scaled**2 + _DATA_DEVIATION**2)
    of_x0 = scaled / np.sqrt(scaled**2 + _DATA_DEVIATION**2)
    next_level = np.append(level[1:], 1.0)
    return StepColumns(
        *levels_of(timesteps, level),
        clip=schedule.clip_sample_range if schedule.clip_sample else NO_CLIP,
        a=np.sqrt(next_level) * of_sample,
        b=np.sqrt(next_level) * of_x0,
        d=np.sqrt(1.0 - next_level),
    )


def distilled_timesteps(schedule: NoiseSchedule, original_inference_steps: int) -> NDArray[np.int64]:
    """The timesteps that a consistency model was distilled on: [original_inference_steps] int64, rising.

    Raises:
        InputError: There are fewer training timesteps.
    """
    stride = schedule.num_train_timesteps // original_inference_steps
    if stride < 1:
        raise InputError(
            f"original_inference_steps={original_inference_steps} is more than the model's "
            f"{schedule.num_train_timesteps} timesteps; give a smaller number"
        )
    return np.arange(1, original_inference_steps + 1, dtype=np.int64) * stride - 1
