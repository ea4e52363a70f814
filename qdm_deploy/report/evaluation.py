"""The result of an evaluation: numbers, how sure they are, and the sentence that follows from them."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

__all__ = ["DistributionRow", "Evaluation", "PairedRow", "Side", "frechet_sentence"]


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Side(_Value):
    """One of the two models: the bundle, which of its graphs, and ``StepSession.describe``."""

    bundle: str
    bundle_id: str
    precision: Literal["int8", "float"]
    backend: dict[str, object]


class PairedRow(_Value):
    """B beside A on the same seeds: mean over seeds, its 95 % interval, and the worst seed."""

    metric: str
    mean: float
    low: float
    high: float
    worst: float


class DistributionRow(_Value):
    """A's and B's pictures beside real ones.

    ``low`` and ``high`` are the 95 % interval of B - A, None where it is not estimated. ``floor`` is the same metric
    between two sets of real pictures, None where there is none.
    """

    metric: str
    a: float
    b: float
    low: float | None = None
    high: float | None = None
    floor: float | None = None

    @property
    def difference(self) -> float:
        """B - A."""
        return self.b - self.a


class Evaluation(_Value):
    """Everything that ``qdm-deploy evaluate`` found.

    ``distribution`` is empty where no classifier fits the model, and ``notes`` say so.
    """

    a: Side
    b: Side
    images: int
    paired_seeds: int
    sampler: str
    steps: int
    seed: int
    guidance: float
    classifier: str | None
    classifier_accuracy: float | None
    paired: tuple[PairedRow, ...]
    distribution: tuple[DistributionRow, ...]
    verdict: str | None
    notes: tuple[str, ...]


def frechet_sentence(row: DistributionRow, images: int) -> str:
    """What the interval of the Frechet difference allows to say.

    Raises:
        ValueError: the row has no interval.
    """
    if row.low is None or row.high is None:
        raise ValueError(f"{row.metric} has no interval, so nothing can be said of it")
    if row.low <= 0 <= row.high:
        word, closer = "is not", ""
    else:
        word, closer = "is", f": {'B' if row.high < 0 else 'A'} is the closer one to the real images"
    return (
        f"The Frechet difference B - A of {row.difference:+.4g} (95 % interval {row.low:+.4g} to {row.high:+.4g}) "
        f"{word} distinguishable from zero at N = {images}{closer}."
    )
