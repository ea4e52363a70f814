"""PLMS: the linear multistep form of PNDM (arXiv 2202.09778, algorithm 2) without its Runge-Kutta steps.

The network's outputs themselves are remembered and combined. The first interval is walked twice: once to its end, and
then, with the output there, again from its start. So n steps are n + 1 calls of the network, and the second call's row
finds the sample it starts again from in what the first row made of it: x_start = (x - g*h0)/a.
"""

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.errors import InputError
from qdm_deploy.samplers.columns import StepColumns, levels_of
from qdm_deploy.samplers.run_options import RunOptions
from qdm_deploy.samplers.schedule import NoiseSchedule
from qdm_deploy.samplers.spacing import spaced_timesteps

__all__ = ["pndm_columns"]

# Weights of this call's output and of those before it (Adams-Bashforth), by how many outputs there are.
_ADAMS_BASHFORTH = {
    1: np.array([1.0, 0.0, 0.0, 0.0]),
    2: np.array([3.0, -1.0, 0.0, 0.0]) / 2.0,
    3: np.array([23.0, -16.0, 5.0, 0.0]) / 12.0,
    4: np.array([55.0, -59.0, 37.0, -9.0]) / 24.0,
}
_REPEATED = 1


def pndm_columns(schedule: NoiseSchedule, run: RunOptions) -> StepColumns:
    """Columns of the PLMS sampler.

    Args:
        schedule: Noise levels, spacing, and where the last step ends (``set_alpha_to_one``, by default false).
        run: Number of steps n, first step. A run that starts in the middle walks its first interval twice too; as in
            diffusers its states are then one interval noisier than their timesteps say.

    Returns:
        Columns of [n + 1], or [1] for one step.

    Raises:
        InputError: The config asks for Runge-Kutta steps or a zero terminal SNR, or the network predicts the image.
    """
    _refuse_foreign_options(schedule)
    spaced = spaced_timesteps(schedule, run.steps)
    timesteps = np.concatenate([spaced[:1], spaced[1:2], spaced[1:]])[run.first_step :]
    level = schedule.alphas_cumprod[timesteps]
    stride = schedule.num_train_timesteps // run.steps
    repeated = np.arange(timesteps.size) == _REPEATED
    starts = np.where(repeated, timesteps + stride, timesteps)
    ends = np.where(repeated, timesteps, timesteps - stride)
    of_sample, of_output = _transfer(schedule, starts, ends)
    weights = np.array([_weights(call) for call in range(timesteps.size)]) * of_output[:, None]
    a, g = of_sample, weights[:, 0]
    if a.size > _REPEATED:
        # The sample that both walks start from, in terms of the second call's inputs.
        weights[_REPEATED, 1] -= a[_REPEATED] * weights[0, 0] / a[0]
        a[_REPEATED] /= a[0]
    return StepColumns(
        *levels_of(timesteps, level),
        a=a,
        g=g,
        c0=weights[:, 1],
        c1=weights[:, 2],
        c2=weights[:, 3],
        u=0.0,
        v=np.where(repeated, 0.0, 1.0),
        w=np.where(repeated, 1.0, 0.0),
    )


def _refuse_foreign_options(schedule: NoiseSchedule) -> None:
    schedule.refuse_zero_terminal_snr("pndm")
    if not schedule.solver.skip_prk_steps:
        raise InputError(
            "the scheduler config has skip_prk_steps=False, so PNDM would start with Runge-Kutta steps, which sampler "
            "'pndm' does not implement: set skip_prk_steps to true in scheduler_config.json, or take sampler 'ddim'"
        )
    if schedule.prediction_type == "sample":
        raise InputError(
            "the model predicts the image (prediction_type='sample'), which sampler 'pndm' does not know; take sampler "
            "'ddim'"
        )


def _transfer(
    schedule: NoiseSchedule, starts: NDArray[np.int64], ends: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The factors of the sample and of the (combined) output in the step from one timestep to another (eq. 9)."""
    level = schedule.alphas_cumprod[starts]
    final = 1.0 if schedule.set_alpha_to_one else schedule.alphas_cumprod[0]
    next_level = np.where(ends >= 0, schedule.alphas_cumprod[ends], final)
    of_noise = -(next_level - level) / (level * np.sqrt(1.0 - next_level) + np.sqrt(level * (1.0 - level) * next_level))
    of_sample = np.sqrt(next_level / level)
    if schedule.prediction_type == "epsilon":
        return of_sample, of_noise
    return of_sample + of_noise * np.sqrt(1.0 - level), of_noise * np.sqrt(level)


def _weights(call: int) -> NDArray[np.float64]:
    if call == _REPEATED:
        return np.array([0.5, 0.5, 0.0, 0.0])
    # The repeated call leaves nothing behind, and its row shifts the history without adding to it.
    return _ADAMS_BASHFORTH[min(call if call > _REPEATED else call + 1, 4)]
