"""The result of an evaluation: numbers, how sure they are, and the sentence that follows from them."""

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

__all__ = ["DistributionRow", "Evaluation", "PairedRow", "Side", "StepRow", "frechet_sentence", "paired_sentence"]


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Side(_Value):
    """One of the two models: the bundle's name and id, which of its graphs, and ``StepSession.describe``."""

    bundle: str
    bundle_id: str
    precision: Literal["int8", "float"]
    backend: dict[str, object]


class PairedRow(_Value):
    """B beside A on ``seeds`` seeds: mean, its 95 % interval, and the worst seed."""

    metric: str
    seeds: int
    mean: float
    low: float
    high: float
    worst: float


class StepRow(_Value):
    """One denoising step, SQNR in dB over all paired seeds with 95 % intervals.

    ``output``: the networks' outputs at A's own samples, so that a step's error is its own. ``sample``: each model on
    its own trajectory, so errors add up as they do in use.
    """

    timestep: int
    output: float
    output_low: float
    output_high: float
    sample: float
    sample_low: float
    sample_high: float


class DistributionRow(_Value):
    """A's and B's pictures beside real ones.

    ``low`` and ``high`` are the 95 % interval of B - A; None where it is not estimated, and then ``why_no_interval``
    says why. ``floor`` is the same metric between two sets of real pictures, None where there is none.
    """

    metric: str
    a: float
    b: float
    low: float | None = None
    high: float | None = None
    floor: float | None = None
    why_no_interval: str | None = None

    @property
    def difference(self) -> float:
        """B - A."""
        return self.b - self.a


class Evaluation(_Value):
    """Everything that ``qdm-deploy evaluate`` found.

    ``distribution`` is empty where no classifier fits the model, and ``notes`` say so.
    """

    schema_version: Literal["1.0"] = "1.0"
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
    per_step: tuple[StepRow, ...]
    distribution: tuple[DistributionRow, ...]
    verdict: str
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


def paired_sentence(rows: Sequence[PairedRow]) -> str:
    """What can be said without real images: how far B is from A, by the last of the rows that were measured."""
    row = rows[-1]
    return (
        f"Beside A, the {row.metric} of B has a mean of {row.mean:.4g} (95 % interval {row.low:.4g} to {row.high:.4g}, "
        f"worst {row.worst:.4g}, N = {row.seeds}); without features of real images nothing says which is better."
    )
