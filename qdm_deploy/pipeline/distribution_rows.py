"""Two sets of generated pictures beside real ones, metric by metric."""

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.progress import SILENT, Progress
from qdm_deploy.report.bootstrap import mean_interval
from qdm_deploy.report.distribution import (
    Gaussian,
    classifier_score,
    frechet_distance,
    gaussian_of,
    kernel_distance,
    kernel_mean,
    precision_recall,
)
from qdm_deploy.report.evaluation import DistributionRow
from qdm_deploy.report.paired_distribution import frechet_difference
from qdm_deploy.runtime.feature_classifier import FeatureClassifier, Features

__all__ = ["distribution_rows"]


def distribution_rows(
    classifier: FeatureClassifier,
    a: Features,
    b: Features,
    labels: NDArray[np.int64] | None,
    progress: Progress = SILENT,
) -> tuple[DistributionRow, ...]:
    """Every metric of A's and B's pictures; the first is the Frechet distance, with the interval of its difference.

    The floor compares as many held-out real pictures with the same reference, so that what a small N adds to a
    distance is in it too; for the spatial maps only their Gaussians are stored, so their floor is that of all pictures.

    Args:
        classifier: made the features; knows those of real pictures.
        a: N pictures of A.
        b: N pictures of B, of the same seeds.
        labels: [N] the classes that were asked for; None for a model without classes.
        progress: told about the resampling.

    Raises:
        InputError: features that are NaN or infinite, or do not fit the reference.
    """
    reference = classifier.reference
    count = len(a.features)
    real, held_out = gaussian_of(reference.features), reference.held_out_features[:count]
    interval = frechet_difference(real, a.features, b.features, progress=progress)
    rows = [
        DistributionRow(
            metric="Frechet distance, features",
            a=frechet_distance(real, gaussian_of(a.features)),
            b=frechet_distance(real, gaussian_of(b.features)),
            low=interval.low,
            high=interval.high,
            floor=frechet_distance(real, gaussian_of(held_out)),
        )
    ]
    with progress.task("Comparing with real pictures", 3) as advance:
        spatial, other = (_stored(*pair) for pair in (reference.spatial, reference.held_out_spatial))
        rows.append(
            DistributionRow(
                metric="Frechet distance, spatial",
                a=frechet_distance(spatial, gaussian_of(a.spatial)),
                b=frechet_distance(spatial, gaussian_of(b.spatial)),
                floor=frechet_distance(spatial, other),
            )
        )
        advance()
        mean = kernel_mean(reference.features)
        distances = [
            kernel_distance(reference.features, made, first_mean=mean) for made in (a.features, b.features, held_out)
        ]
        rows.append(DistributionRow(metric="kernel distance", a=distances[0], b=distances[1], floor=distances[2]))
        advance()
        # The balls shrink as a set grows, so both sets are of one size.
        some = reference.features[:count]
        pairs = [precision_recall(some, made[: len(some)]) for made in (a.features, b.features, held_out)]
        for index, metric in enumerate(("precision", "recall")):
            values = [pair[index] for pair in pairs]
            rows.append(DistributionRow(metric=metric, a=values[0], b=values[1], floor=values[2]))
        advance()
    rows.append(DistributionRow(metric="classifier score", a=classifier_score(a.logits), b=classifier_score(b.logits)))
    if labels is not None:
        rows.append(_agreement(a, b, labels, classifier.card.test_accuracy))
    return tuple(rows)


def _stored(mean: NDArray[np.float32], covariance: NDArray[np.float32]) -> Gaussian:
    return Gaussian(mean.astype(np.float64), covariance.astype(np.float64))


def _agreement(a: Features, b: Features, labels: NDArray[np.int64], accuracy: float) -> DistributionRow:
    """Share of pictures that the classifier takes for what was asked for; its floor is the accuracy on real ones."""
    right = [(made.logits.argmax(axis=1) == labels).astype(np.float64) for made in (a, b)]
    interval = mean_interval((right[1] - right[0]).tolist())
    return DistributionRow(
        metric="label agreement",
        a=float(right[0].mean()),
        b=float(right[1].mean()),
        low=interval.low,
        high=interval.high,
        floor=accuracy,
    )
