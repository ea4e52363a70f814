"""Weight scales at which a convolution behind an upsampling can run in phases: there, sums of codes are codes too."""

import numpy as np
from numpy.typing import NDArray

from qdm_calibration.ranges import quantize_weight
from qdm_deploy.artifacts.phase_sums import PHASES, phase_sums

__all__ = ["scale_for_phases"]

# Learned rounding may move each of the four codes of a sum by one more.
_LARGEST_SUM = 127 - 4


def scale_for_phases(
    weight: NDArray[np.float32], scale: NDArray[np.float32], bits: int
) -> tuple[NDArray[np.float32], dict[str, str]]:
    """The smallest scales, from ``scale`` up, at which the summed codes of every phase are int8.

    Args:
        weight: [O, I, 3, 3].
        scale: per output channel, [O], exact in float16.
        bits: of the codes; those of 4 always fit.

    Returns:
        [O], exact in float16; and a note on "w" for the plan, none where nothing changed.
    """
    fitting = scale.copy()
    while True:
        codes = quantize_weight(weight, fitting, bits)
        sums = np.max([np.abs(phase_sums(codes, phase)).max(axis=(1, 2, 3)) for phase in PHASES], axis=0)
        wide = sums > _LARGEST_SUM
        if not wide.any():
            break
        # A little less than what the sums ask for: rounding may make the codes fit earlier. At least the next float16.
        wanted = (fitting[wide] * np.maximum(sums[wide] / (_LARGEST_SUM + 1), 1)).astype(np.float16)
        fitting[wide] = np.maximum(wanted, np.nextafter(fitting[wide].astype(np.float16), np.float16(np.inf)))
    if not (fitting > scale).any():
        return fitting, {}
    wider = float(np.median(fitting / scale))
    return fitting, {
        "w": f"steps {wider:.2g} times as wide, so that sums of the codes are int8 and it can run in phases"
    }
