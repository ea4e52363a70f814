"""What real pictures score beside other real ones: the floor of each metric, computed once and kept."""

from pathlib import Path

import numpy as np

from qdm_deploy.evaluate.feature_classifier import FeatureClassifier
from qdm_deploy.evaluate.sample_cache import SampleCache
from qdm_deploy.metrics.distribution import (
    Gaussian,
    frechet_distance,
    gaussian_of,
    kernel_distance,
    kernel_mean,
    precision_recall,
)
from qdm_deploy.progress import SILENT, Progress

__all__ = ["FLOORS", "KERNEL_MEAN", "real_floor"]

FLOORS = ("Frechet distance, features", "Frechet distance, spatial", "kernel distance", "precision", "recall")
KERNEL_MEAN = "kernel mean"


def real_floor(
    classifier: FeatureClassifier, count: int, root: Path | None = None, progress: Progress = SILENT
) -> dict[str, float]:
    """``FLOORS`` between the reference and ``count`` held-out real pictures, and the reference's ``kernel_mean``.

    As many held-out pictures as there are made ones, so that what a small N adds to a distance is in the floor too. For
    the spatial maps only the Gaussians of all pictures are stored, so their floor is that of all of them.

    Args:
        classifier: knows the features of both real sets.
        count: how many held-out pictures.
        root: as in ``SampleCache``.
        progress: told when the comparison has to be made.
    """
    cache = SampleCache({"real pictures": classifier.card.sha256}, root)
    names = (*FLOORS, KERNEL_MEAN)

    def make() -> dict[str, np.ndarray]:
        with progress.task("Comparing real pictures with real ones", None):
            return {"values": np.array([_values(classifier, count)])}

    one = slice(0, 1)
    values = cache.tensors(f"floor-{count}", one, {"values": (len(names),)}, make, progress)["values"][0]
    return dict(zip(names, values.tolist(), strict=True))


def _values(classifier: FeatureClassifier, count: int) -> list[float]:
    reference = classifier.reference
    held_out = reference.held_out_features[:count]
    spatial, other = (
        Gaussian(mean.astype(np.float64), covariance.astype(np.float64))
        for mean, covariance in (reference.spatial, reference.held_out_spatial)
    )
    own = kernel_mean(reference.features)
    # The balls shrink as a set grows, so both sets are of one size.
    some = reference.features[:count]
    precision, recall = precision_recall(some, held_out[: len(some)])
    return [
        frechet_distance(gaussian_of(reference.features), gaussian_of(held_out)),
        frechet_distance(spatial, other),
        kernel_distance(reference.features, held_out, first_mean=own),
        precision,
        recall,
        own,
    ]
