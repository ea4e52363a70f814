"""Whether B is further from the real pictures than A is, when both were made from the same seeds.

The difference of the two distances is resampled over the seeds, with the same seeds for A and B: what a lucky or
unlucky choice of seeds does to both cancels, and so does most of the distances' bias at small N.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.errors import InputError
from qdm_deploy.progress import SILENT, Progress
from qdm_deploy.report.bootstrap import RESAMPLES, Interval, interval_of, resampled_indices
from qdm_deploy.report.distribution import Gaussian, frechet_distance, gaussian_of

__all__ = ["frechet_difference"]

Array = NDArray[np.floating[Any]]


def frechet_difference(
    real: Gaussian, a: Array, b: Array, *, resamples: int = RESAMPLES, seed: int = 0, progress: Progress = SILENT
) -> Interval:
    """frechet_distance(real, B) - frechet_distance(real, A), with its interval; positive where B is further away.

    Args:
        real: the real pictures' features; they are not resampled.
        a: [N, D] features of A's pictures.
        b: [N, D] features of B's pictures of the same seeds, in the same order.
        resamples: bootstrap draws; each takes the same rows of ``a`` and ``b``.
        seed: of the draws.
        progress: advances by one for each draw.

    Raises:
        InputError: unequal shapes, fewer than two pairs, NaN or infinity.
    """
    if a.shape != b.shape:
        raise InputError(
            f"features of shape {list(a.shape)} and {list(b.shape)} are no pairs; give one row per seed in both"
        )
    root = real.root

    def difference(rows: slice | NDArray[np.int64]) -> float:
        first, second = (frechet_distance(real, gaussian_of(side[rows]), first_root=root) for side in (a, b))
        return second - first

    draws = []
    with progress.task("Resampling the Frechet difference", resamples) as advance:
        for rows in resampled_indices(len(a), resamples=resamples, seed=seed):
            draws.append(difference(rows))
            advance()
    return interval_of(difference(slice(None)), draws)
