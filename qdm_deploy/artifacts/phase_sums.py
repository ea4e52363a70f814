"""A 3x3 convolution behind a nearest-neighbour upsampling by two, as four of 2x2 on the small tensor.

An output pixel reads a 3x3 window of the upsampled tensor, in which each small pixel stands four times: the window has
only 2x2 different values. Which ones depends on whether its row and column are even or odd, its phase, and so does
which taps of the kernel fall together and are summed. Four small convolutions, one for each phase, do 16 products
where the large one does 36. (The transposed convolution of stride 2 with the 4x4 kernel of all sums is the same.)

With integer codes the sums are exact: the four convolutions return the very integers of the large one, if the sums fit
the type of the codes.
"""

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.artifacts.plan import LayerPlan
from qdm_deploy.artifacts.topology import Layer

__all__ = ["PHASES", "fits_phases", "phase_sums", "upsampled"]

# Taps of the three rows (or columns) that fall on the first and on the second pixel, for even and for odd outputs.
_TAPS = (((0,), (1, 2)), ((0, 1), (2,)))
PHASES = ((0, 0), (0, 1), (1, 0), (1, 1))


def phase_sums(kernel: NDArray[np.generic], phase: tuple[int, int]) -> NDArray[np.int32]:
    """Summed codes of one phase.

    Args:
        kernel: codes, [O, I, 3, 3].
        phase: parity of the output's row and column.

    Returns:
        [O, I, 2, 2].
    """
    wide = kernel.astype(np.int32)
    rows = np.stack([wide[:, :, list(taps)].sum(axis=2) for taps in _TAPS[phase[0]]], axis=2)
    return np.stack([rows[:, :, :, list(taps)].sum(axis=3) for taps in _TAPS[phase[1]]], axis=3)


def fits_phases(plan: LayerPlan) -> bool:
    """Whether an INT8 layer reads an upsampled tensor and its summed codes are int8."""
    if not plan.layer.upsampled or plan.precision != "int8":
        return False
    return all(np.abs(phase_sums(plan.codes, phase)).max() <= 127 for phase in PHASES)


def upsampled(data: NDArray[np.float32], layer: Layer) -> NDArray[np.float32]:
    """What a layer's module reads, [B, C, H, W], where a graph that runs it in phases has the small tensor."""
    if not layer.upsampled or data.shape[2:] == layer.spatial:
        return data
    return data.repeat(2, axis=2).repeat(2, axis=3)
