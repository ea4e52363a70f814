"""Trajectory consistency distillation (arXiv 2402.19159, algorithm 4): a jump too far down, and part of it back up.

A step jumps to timestep s = floor((1 - gamma)*t'), below the next timestep t', and adds the noise that leads back to
t'. At gamma 0 it is deterministic. The last step jumps to timestep 0. There is no clipping.
"""

import numpy as np

from qdm_deploy.errors import InputError
from qdm_deploy.samplers.columns import StepColumns, levels_of, noise_columns
from qdm_deploy.samplers.lcm import distilled_timesteps
from qdm_deploy.samplers.run_options import RunOptions
from qdm_deploy.samplers.schedule import NoiseSchedule
from qdm_deploy.samplers.spacing import consistency_timesteps, given_timesteps

__all__ = ["tcd_columns"]


def tcd_columns(schedule: NoiseSchedule, run: RunOptions) -> StepColumns:
    """Columns of the TCD sampler.

    Args:
        schedule: Noise levels and ``original_inference_steps``.
        run: Number of steps or listed timesteps, eta (the paper's gamma). With original inference steps of the
            caller's own any training timestep may be visited, as in diffusers.

    Returns:
        Columns of [S].

    Raises:
        InputError: More steps than the model was distilled on, or more of those than there are timesteps.
    """
    if run.timesteps is not None:
        timesteps = given_timesteps(schedule, run.timesteps, whole=True).astype(np.int64)
    elif run.original_inference_steps is not None:
        if run.steps > run.original_inference_steps:
            raise InputError(
                f"{run.steps} steps are more than original_inference_steps={run.original_inference_steps}; take fewer"
            )
        timesteps = consistency_timesteps(schedule, run.steps, np.arange(schedule.num_train_timesteps))
    else:
        distilled = distilled_timesteps(schedule, schedule.solver.original_inference_steps)
        timesteps = consistency_timesteps(schedule, run.steps, distilled)
    level = schedule.alphas_cumprod[timesteps]
    next_timesteps = np.append(timesteps[1:], 0)
    # The product is rounded to float32 before it is cut, as in diffusers.
    jump = np.floor(np.float32(1.0 - run.eta) * next_timesteps.astype(np.float32)).astype(np.int64)
    jump_level = schedule.alphas_cumprod[jump]
    kept = schedule.alphas_cumprod[next_timesteps] / jump_level
    kept[-1] = 1.0
    of_sample, of_output = noise_columns(schedule.prediction_type, np.sqrt(level), np.sqrt(1.0 - level))
    direction = np.sqrt(kept * (1.0 - jump_level))
    return StepColumns(
        *levels_of(timesteps, level),
        a=direction * of_sample,
        b=np.sqrt(kept * jump_level),
        g=direction * of_output,
        d=np.sqrt(1.0 - kept),
    )
