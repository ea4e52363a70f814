"""One denoising update in numpy: the reference for what every compiled step graph does after its U-Net."""

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.samplers.columns import COEFFICIENTS, LEARNED_VARIANCE_COEFFICIENTS

__all__ = ["apply_step"]

_Array = NDArray[np.float32]


def apply_step(
    coefficients: _Array, sample: _Array, model_output: _Array, previous_x0: _Array, noise: _Array
) -> tuple[_Array, _Array]:
    """Take every sample of a batch one step down; each row may stand at its own step of its own sampler.

    Args:
        coefficients: [B, 7] float32 rows of a ``StepTable``, or [B, 9] for a learned variance.
        sample: [B, C, H, W] float32, the state x_t.
        model_output: [B, C, H, W] float32 prediction of the network; [B, 2C, H, W] for nine coefficients.
        previous_x0: [B, C, H, W] float32, x0 of the step before; anything finite at the first step.
        noise: [B, C, H, W] float32 standard normal; anything finite where ``d`` is zero.

    Returns:
        The next sample and x0, both [B, C, H, W] float32 and new.

    Raises:
        ValueError: The number of coefficients or of output channels does not fit.
    """
    batch, channels = sample.shape[:2]
    expected = {len(COEFFICIENTS): channels, len(LEARNED_VARIANCE_COEFFICIENTS): 2 * channels}
    if coefficients.ndim != 2 or coefficients.shape[0] != batch or coefficients.shape[1] not in expected:
        raise ValueError(f"coefficients has shape {coefficients.shape}; for {batch} samples give [{batch}, 7 or 9]")
    if model_output.shape[1] != expected[coefficients.shape[1]]:
        raise ValueError(
            f"model_output has {model_output.shape[1]} channels; {coefficients.shape[1]} coefficients and a sample of "
            f"{channels} channels need {expected[coefficients.shape[1]]}"
        )
    p, q, clip, a, b, c, d, *log_variance = (
        column[:, None, None, None] for column in coefficients.astype(np.float32, copy=False).T
    )
    x0 = np.clip(p * sample + q * model_output[:, :channels], -clip, clip)
    if log_variance:
        low, high = log_variance
        share = (model_output[:, channels:] + np.float32(1.0)) * np.float32(0.5)
        noise = noise * np.exp(np.float32(0.5) * (share * high + (np.float32(1.0) - share) * low))
    return a * sample + b * x0 + c * previous_x0 + d * noise, x0
