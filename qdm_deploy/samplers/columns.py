"""The columns of a sampler's table before they are cast: float64, one value per step.

Each sampler is the affine update

    x0   = clip(p*x + q*e)                                    prediction columns: what the network predicts
    next = a*x + b*x0 + c*previous_x0 + d*noise               update columns: what the sampler does

so p and q depend on the model alone and are computed here for all samplers; a, b, c and d come from the sampler.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.errors import InputError
from qdm_deploy.samplers.schedule import PredictionType

__all__ = ["COEFFICIENTS", "LEARNED_VARIANCE_COEFFICIENTS", "NO_CLIP", "StepColumns", "prediction_columns"]

COEFFICIENTS = ("p", "q", "clip", "a", "b", "c", "d")
LEARNED_VARIANCE_COEFFICIENTS = (*COEFFICIENTS, "log_var_min", "log_var_max")

# Finite and below the float32 maximum: an infinite bound times a zero would be NaN in a compiled graph.
NO_CLIP = 3.0e38


@dataclass(frozen=True, eq=False)
class StepColumns:
    """What one sampler contributes; every array is [S] float64, ``timesteps`` [S] int64.

    ``alphas_cumprod`` is the signal level at each timestep as this sampler sees it. The log-variance bounds are zero
    (a standard deviation of one) unless the noise of the step is scaled by what the model learned.
    """

    timesteps: NDArray[np.int64]
    alphas_cumprod: NDArray[np.float64]
    clip: float
    a: NDArray[np.float64]
    b: NDArray[np.float64]
    c: NDArray[np.float64]
    d: NDArray[np.float64]
    log_var_min: NDArray[np.float64]
    log_var_max: NDArray[np.float64]


def prediction_columns(
    prediction_type: PredictionType, alphas_cumprod: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The p and q of x0 = p*x + q*e.

    Args:
        prediction_type: What the network predicts.
        alphas_cumprod: [S] float64 signal level per step.

    Returns:
        p and q, each [S] float64.

    Raises:
        InputError: The network predicts noise and a step has no signal at all, so that x0 cannot be recovered.

    Source: epsilon, DDPM (arXiv 2006.11239) eq. 15; v, Progressive Distillation (arXiv 2202.00512) appendix D.
    """
    signal, noise = np.sqrt(alphas_cumprod), np.sqrt(1.0 - alphas_cumprod)
    if prediction_type == "sample":
        return np.zeros_like(signal), np.ones_like(signal)
    if prediction_type == "v_prediction":
        return signal, -noise
    if np.any(signal == 0.0):
        raise InputError(
            "prediction_type='epsilon' with rescale_betas_zero_snr=True starts where the image is pure noise, so no "
            "image can be derived from predicted noise; use a v_prediction model or the dpmpp-2m or euler sampler"
        )
    return 1.0 / signal, -noise / signal
