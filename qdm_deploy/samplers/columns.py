"""The columns of a sampler's table: the one place that knows their order, and the form in which samplers fill them.

With e the network's (guided) output, x the sample and h0, h1, h2 the history (newest first), every sampler is the
affine update

    x0      = clip(p*x + q*e, -clip, clip)                          what the network predicts
    next    = a*x + b*x0 + g*e + c0*h0 + c1*h1 + c2*h2 + d*noise    what the sampler does
    push    = u*x0 + v*e + w*h0                                     what it remembers
    history = (push, h0, h1)

so p and q depend on the model alone and are computed here for all samplers; the other columns come from the sampler.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.errors import InputError
from qdm_deploy.samplers.schedule import PredictionType

__all__ = [
    "COEFFICIENTS",
    "HISTORY",
    "LEARNED_VARIANCE_COEFFICIENTS",
    "NO_CLIP",
    "StepColumns",
    "column",
    "levels_of",
    "noise_columns",
    "prediction_columns",
    "stack_columns",
]

COEFFICIENTS = ("p", "q", "clip", "a", "b", "g", "c0", "c1", "c2", "d", "u", "v", "w")
LEARNED_VARIANCE_COEFFICIENTS = (*COEFFICIENTS, "log_var_min", "log_var_max")

# Number of tensors that a step may look back at.
HISTORY = 3

# Finite and below the float32 maximum: an infinite bound times a zero would be NaN in a compiled graph.
NO_CLIP = 3.0e38

_Column = NDArray[np.float64] | float


def column(name: str) -> int:
    """Index of a column of a ``StepTable``'s coefficients.

    Raises:
        ValueError: No column has this name.
    """
    return LEARNED_VARIANCE_COEFFICIENTS.index(name)


@dataclass(frozen=True, eq=False)
class StepColumns:
    """What one sampler contributes, before it is cast: ``timesteps``, ``signal`` and ``noise`` are [S] float64.

    ``signal`` and ``noise`` are those of the state a step starts from: x = signal*image + noise*unit noise. Every
    column is [S] float64 or one number for all steps; a step remembers x0 unless it says otherwise. The log-variance
    bounds are zero (a standard deviation of one) unless the noise of the step is scaled by what the model learned.
    """

    timesteps: NDArray[np.float64]
    signal: NDArray[np.float64]
    noise: NDArray[np.float64]
    clip: float = NO_CLIP
    initial_scale: float = 1.0
    a: _Column = 0.0
    b: _Column = 0.0
    g: _Column = 0.0
    c0: _Column = 0.0
    c1: _Column = 0.0
    c2: _Column = 0.0
    d: _Column = 0.0
    u: _Column = 1.0
    v: _Column = 0.0
    w: _Column = 0.0
    log_var_min: _Column = 0.0
    log_var_max: _Column = 0.0


def levels_of(
    timesteps: NDArray[np.int64], alphas_cumprod: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """The ``timesteps``, ``signal`` and ``noise`` of ``StepColumns`` for a sampler that walks training timesteps.

    Args:
        timesteps: [S] int64.
        alphas_cumprod: [S] float64, the signal level at each of them.
    """
    return timesteps.astype(np.float64), np.sqrt(alphas_cumprod), np.sqrt(1.0 - alphas_cumprod)


def prediction_columns(
    prediction_type: PredictionType, signal: NDArray[np.float64], noise: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The p and q of x0 = p*x + q*e.

    Args:
        prediction_type: What the network predicts.
        signal: [S] float64 share of the image in x.
        noise: [S] float64 share of the unit noise in x.

    Returns:
        p and q, each [S] float64.

    Raises:
        InputError: The network predicts noise and a step has no signal at all, so that x0 cannot be recovered.

    Source: epsilon, DDPM (arXiv 2006.11239) eq. 15; v, Progressive Distillation (arXiv 2202.00512) appendix D.
    """
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


def noise_columns(
    prediction_type: PredictionType, signal: NDArray[np.float64], noise: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The factors of x and e in the predicted unit noise, whatever happens to x0; arguments as above.

    Returns:
        Two arrays [S] float64.
    """
    if prediction_type == "epsilon":
        return np.zeros_like(signal), np.ones_like(signal)
    if prediction_type == "v_prediction":
        return noise, signal
    return 1.0 / noise, -signal / noise


def stack_columns(columns: StepColumns, prediction_type: PredictionType, learned_variance: bool) -> NDArray[np.float32]:
    """The coefficients of a table: [S, 13] float32, or [S, 15] for a model with a learned variance.

    Raises:
        InputError: As ``prediction_columns``.
    """
    p, q = prediction_columns(prediction_type, columns.signal, columns.noise)
    names = LEARNED_VARIANCE_COEFFICIENTS if learned_variance else COEFFICIENTS
    values = [p if name == "p" else q if name == "q" else getattr(columns, name) for name in names]
    return np.stack([np.broadcast_to(value, p.shape) for value in values], axis=1).astype(np.float32)
