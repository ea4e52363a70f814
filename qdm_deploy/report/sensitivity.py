"""How much noise INT8 adds to the network's output, layer by layer, and what keeping layers in float would give."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from qdm_deploy.report.value import Count, Decibels, NotNegative, Share, Value

__all__ = ["FrontierRow", "NoiseBlock"]


class FrontierRow(Value):
    """The network with the layers up to this one in float, the one that adds most noise first.

    Attributes:
        layer: the layer that goes float here; None for the plan with every INT8 layer in INT8.
        int8_share: part of the INT8 layers' multiply-accumulates that still runs in INT8.
        noise_share: part of their noise that is left.
        sqnr_db: predicted SQNR of the network's output, mean over the timesteps.
        step_ms: predicted time of a step; None where the times of single layers were not measured.
    """

    layer: str | None
    int8_share: Share
    noise_share: Share
    sqnr_db: Decibels
    step_ms: NotNegative | None = None


class NoiseBlock(Value):
    """A measurement with one quantized layer at a time, and the frontier that follows from it.

    Noise is counted relative to the signal of each timestep. Predictions add the powers of the single layers.

    Attributes:
        rows: calibration rows that were run for each layer.
        timesteps: how many distinct ones they have.
        frontier: from all in INT8 to the last layer but those without which no noise would be left.
        kept: layers that the build keeps in float because it was asked to.
        sqnr_db: predicted with ``kept`` in float; None where no noise is left.
        int8_share: with ``kept`` in float.
        step_ms: predicted with ``kept`` in float; None where the times of single layers were not measured.
        timed_on: what they were measured on.
    """

    rows: Annotated[int, Field(gt=0)]
    timesteps: Annotated[int, Field(gt=0)]
    frontier: tuple[FrontierRow, ...]
    kept: Count
    sqnr_db: Decibels | None
    int8_share: Share
    step_ms: NotNegative | None = None
    timed_on: str | None = None

    @model_validator(mode="after")
    def _falling(self) -> Self:
        shares = [row.int8_share for row in self.frontier]
        if shares != sorted(shares, reverse=True):
            raise ValueError("the INT8 share of the frontier rises from one point to the next")
        return self
