"""Two sets of generated pictures beside real ones, metric by metric."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.evaluate.feature_classifier import FeatureClassifier, Features
from qdm_deploy.evaluate.real_floor import FLOORS, KERNEL_MEAN
from qdm_deploy.metrics.bootstrap import Interval, mean_interval
from qdm_deploy.metrics.distribution import (
    Gaussian,
    classifier_score,
    covered,
    frechet_distance,
    gaussian_of,
    kernel_distance,
)
from qdm_deploy.metrics.paired_distribution import (
    KERNEL_LIMIT,
    frechet_difference,
    kernel_difference,
    score_difference,
)
from qdm_deploy.progress import SILENT, Progress
from qdm_deploy.report.evaluation import DistributionRow

__all__ = ["distribution_rows"]

_SPATIAL = "a draw takes a root of a {0}x{0} matrix for each side, and thousands are needed"
_RECALL = "a set with repeated pictures has smaller balls, so drawing with replacement would bias it"


def distribution_rows(
    classifier: FeatureClassifier,
    a: Features,
    b: Features,
    labels: NDArray[np.int64] | None,
    floor: Mapping[str, float],
    progress: Progress = SILENT,
) -> tuple[DistributionRow, ...]:
    """Every metric of A's and B's pictures; the first is the Frechet distance.

    Intervals are of the difference B - A, over the seeds and not over the real pictures.

    Args:
        classifier: made the features; knows those of real pictures.
        a: N pictures of A.
        b: N pictures of B, of the same seeds.
        labels: [N] the classes that were asked for; None for a model without classes.
        floor: ``real_floor`` for N.
        progress: told about the resampling.

    Raises:
        InputError: features that are NaN or infinite, or do not fit the reference.
    """
    real = classifier.reference.features
    rows = [_frechet(real, a, b, floor, progress)]
    with progress.task("Comparing with real pictures", 4) as advance:
        mean, covariance = classifier.reference.spatial
        spatial = Gaussian(mean.astype(np.float64), covariance.astype(np.float64))
        rows.append(
            DistributionRow(
                metric=FLOORS[1],
                a=frechet_distance(spatial, gaussian_of(a.spatial)),
                b=frechet_distance(spatial, gaussian_of(b.spatial)),
                floor=floor[FLOORS[1]],
                why_no_interval=_SPATIAL.format(a.spatial.shape[1]),
            )
        )
        advance()
        distances = [kernel_distance(real, made.features, first_mean=floor[KERNEL_MEAN]) for made in (a, b)]
        advance()
        few = len(a.features) <= KERNEL_LIMIT
        rows.append(
            _row(
                FLOORS[2],
                (distances[0], distances[1]),
                kernel_difference(real, a.features, b.features, progress=progress) if few else None,
                floor[FLOORS[2]],
                f"it is only estimated for up to {KERNEL_LIMIT} pictures",
            )
        )
        advance()
        rows += _precision_and_recall(real, a, b, floor)
        advance()
    scores = (classifier_score(a.logits), classifier_score(b.logits))
    rows.append(_row("classifier score", scores, score_difference(a.logits, b.logits)))
    if labels is not None:
        right = tuple((made.logits.argmax(axis=1) == labels).astype(np.float64) for made in (a, b))
        rows.append(_shares("asked-for label", (right[0], right[1]), classifier.card.test_accuracy))
    return tuple(rows)


def _row(
    metric: str,
    values: tuple[float, float],
    interval: Interval | None,
    floor: float | None = None,
    why_no_interval: str | None = None,
) -> DistributionRow:
    return DistributionRow(
        metric=metric,
        a=values[0],
        b=values[1],
        low=None if interval is None else interval.low,
        high=None if interval is None else interval.high,
        floor=floor,
        why_no_interval=why_no_interval if interval is None else None,
    )


def _frechet(
    real: NDArray[np.float32], a: Features, b: Features, floor: Mapping[str, float], progress: Progress
) -> DistributionRow:
    whole = gaussian_of(real)
    distances = [frechet_distance(whole, gaussian_of(made.features)) for made in (a, b)]
    interval = frechet_difference(whole, a.features, b.features, progress=progress)
    return _row(FLOORS[0], (distances[0], distances[1]), interval, floor[FLOORS[0]])


def _precision_and_recall(
    real: NDArray[np.float32], a: Features, b: Features, floor: Mapping[str, float]
) -> list[DistributionRow]:
    # The balls shrink as a set grows, so both sets are of one size.
    some = real[: len(a.features)]
    made = [side.features[: len(some)] for side in (a, b)]
    inside = [covered(some, side).astype(np.float64) for side in made]
    found = [float(covered(side, some).mean()) for side in made]
    return [
        _shares(FLOORS[3], (inside[0], inside[1]), floor[FLOORS[3]]),
        _row(FLOORS[4], (found[0], found[1]), None, floor[FLOORS[4]], _RECALL),
    ]


def _shares(metric: str, each: tuple[NDArray[np.float64], NDArray[np.float64]], floor: float) -> DistributionRow:
    """A share of pictures: a mean of zeros and ones, one for each seed."""
    return _row(
        metric, (float(each[0].mean()), float(each[1].mean())), mean_interval((each[1] - each[0]).tolist()), floor
    )
