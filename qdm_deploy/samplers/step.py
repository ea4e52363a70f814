"""One denoising update in numpy: the reference for what every compiled step graph does after its U-Net."""

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.samplers.columns import COEFFICIENTS, HISTORY, LEARNED_VARIANCE_COEFFICIENTS

__all__ = ["apply_step"]

_Array = NDArray[np.float32]


def apply_step(
    coefficients: _Array, sample: _Array, model_output: _Array, history: _Array, noise: _Array
) -> tuple[_Array, _Array, _Array]:
    """Take every sample of a batch one step down; each row may stand at its own step of its own sampler.

    Args:
        coefficients: [B, 13] float32 rows of a ``StepTable``, or [B, 15] for a learned variance.
        sample: [B, C, H, W] float32, the state x_t.
        model_output: [B, C, H, W] float32 prediction of the network; [B, 2C, H, W] for fifteen coefficients.
        history: [B, 3C, H, W] float32, what the three steps before pushed, newest first; anything finite at the
            first step, as a rule zeros.
        noise: [B, C, H, W] float32 standard normal; anything finite where ``d`` is zero.

    Returns:
        The next sample and x0, both [B, C, H, W], and the next history [B, 3C, H, W]; all float32 and new.

    Raises:
        ValueError: The number of coefficients, of output channels or of history channels does not fit.
    """
    batch, channels = sample.shape[:2]
    expected = {len(COEFFICIENTS): channels, len(LEARNED_VARIANCE_COEFFICIENTS): 2 * channels}
    if coefficients.ndim != 2 or coefficients.shape[0] != batch or coefficients.shape[1] not in expected:
        raise ValueError(f"coefficients has shape {coefficients.shape}; for {batch} samples give [{batch}, 13 or 15]")
    if model_output.shape[1] != expected[coefficients.shape[1]]:
        raise ValueError(
            f"model_output has {model_output.shape[1]} channels; {coefficients.shape[1]} coefficients and a sample of "
            f"{channels} channels need {expected[coefficients.shape[1]]}"
        )
    if history.shape != (batch, HISTORY * channels, *sample.shape[2:]):
        raise ValueError(
            f"history has shape {history.shape}; for this sample give {(batch, HISTORY * channels, *sample.shape[2:])}"
        )
    p, q, clip, a, b, g, c0, c1, c2, d, u, v, w, *log_variance = (
        column[:, None, None, None] for column in coefficients.astype(np.float32, copy=False).T
    )
    output = model_output[:, :channels]
    h0, h1, h2 = np.split(history, HISTORY, axis=1)
    x0 = np.clip(p * sample + q * output, -clip, clip)
    if log_variance:
        low, high = log_variance
        share = (model_output[:, channels:] + np.float32(1.0)) * np.float32(0.5)
        noise = noise * np.exp(np.float32(0.5) * (share * high + (np.float32(1.0) - share) * low))
    following = a * sample + b * x0 + g * output + c0 * h0 + c1 * h1 + c2 * h2 + d * noise
    return following, x0, np.concatenate([u * x0 + v * output + w * h0, h0, h1], axis=1)
