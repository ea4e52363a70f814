"""The forward process of a diffusers scheduler config: from a named beta schedule to the signal levels.

Every step below runs in the precision in which diffusers runs it (float32 betas, a float64 running product that is
rounded to float32 at the end), because these rounded levels are what the model was trained on. Near t = 0, where
``1 - alphas_cumprod`` is about 1e-4, a float64 schedule would move sigma by 1e-4 of its value.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.errors import InputError

__all__ = [
    "BetaSchedule",
    "alphas_cumprod_from_betas",
    "checked_trained_betas",
    "named_betas",
    "zero_terminal_snr",
]

BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"]

_MAX_BETA = 0.999


def named_betas(name: BetaSchedule, beta_start: float, beta_end: float, timesteps: int) -> NDArray[np.float32]:
    """Betas of a schedule that diffusers knows by name.

    Args:
        name: ``beta_schedule`` of the config.
        beta_start: First beta; unused by the cosine and Laplace schedules.
        beta_end: Last beta; unused by the cosine and Laplace schedules.
        timesteps: Number of training timesteps T.

    Returns:
        [T] float32.

    Source: linear, DDPM (arXiv 2006.11239) section 4; squaredcos_cap_v2, Improved DDPM (arXiv 2102.09672) eq. 17.
    """
    if name == "linear":
        return _torch_linspace(beta_start, beta_end, timesteps)
    if name == "scaled_linear":
        return np.square(_torch_linspace(math.sqrt(beta_start), math.sqrt(beta_end), timesteps))
    if name == "sigmoid":
        gate = np.float32(1.0) / (np.float32(1.0) + np.exp(-_torch_linspace(-6.0, 6.0, timesteps)))
        return np.asarray(gate * np.float32(beta_end - beta_start) + np.float32(beta_start), dtype=np.float32)
    return _betas_of_signal_level(_cosine_level if name == "squaredcos_cap_v2" else _laplace_level, timesteps)


def _torch_linspace(start: float, end: float, count: int) -> NDArray[np.float32]:
    # torch rounds the step to float32 and counts from both ends; numpy's own linspace differs from it in the last bit
    # of every third value.
    step = float(np.float32(np.float32(end) - np.float32(start)) / np.float32(max(count - 1, 1)))
    index = np.arange(count, dtype=np.float64)
    rising, falling = np.float32(start) + step * index, np.float32(end) - step * (count - 1 - index)
    return np.where((index < count // 2) | (count == 1), rising, falling).astype(np.float32)


def _betas_of_signal_level(level: Callable[[float], float], timesteps: int) -> NDArray[np.float32]:
    levels = [level(i / timesteps) for i in range(timesteps + 1)]
    betas = [min(1.0 - after / before, _MAX_BETA) for before, after in pairwise(levels)]
    return np.asarray(betas, dtype=np.float32)


def _cosine_level(time: float) -> float:
    return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2


def _laplace_level(time: float) -> float:
    log_snr = -0.5 * math.copysign(1.0, 0.5 - time) * math.log(1.0 - 2.0 * abs(0.5 - time) + 1e-6)
    snr = math.exp(log_snr)
    return math.sqrt(snr / (1.0 + snr))


def zero_terminal_snr(betas: NDArray[np.float32]) -> NDArray[np.float32]:
    """Betas shifted and scaled so that the last timestep holds no signal at all.

    Args:
        betas: [T] float32.

    Returns:
        [T] float32; the last one is 1.

    Source: "Common Diffusion Noise Schedules and Sample Steps are Flawed" (arXiv 2305.08891), algorithm 1.
    """
    root = np.sqrt(alphas_cumprod_from_betas(betas).astype(np.float32))
    first, last = root[0], root[-1]
    root = (root - last) * (first / (first - last))
    level = np.square(root)
    alphas = np.concatenate([level[:1], level[1:] / level[:-1]])
    return np.asarray(np.float32(1.0) - alphas, dtype=np.float32)


def alphas_cumprod_from_betas(betas: NDArray[np.float32]) -> NDArray[np.float64]:
    """Running product of 1 - beta, as the float32 values that diffusers holds.

    Args:
        betas: [T] float32.

    Returns:
        [T] float64 whose values are exact in float32, falling.
    """
    alphas = np.float32(1.0) - betas
    return np.cumprod(alphas.astype(np.float64)).astype(np.float32).astype(np.float64)


def checked_trained_betas(betas: Sequence[float], timesteps: int) -> NDArray[np.float32]:
    """``trained_betas`` of a config as an array, one per training timestep.

    Raises:
        InputError: Their number is not ``num_train_timesteps``.
    """
    if len(betas) != timesteps:
        raise InputError(
            f"trained_betas holds {len(betas)} values but num_train_timesteps is {timesteps}; "
            "give one beta per training timestep"
        )
    return np.asarray(betas, dtype=np.float32)
