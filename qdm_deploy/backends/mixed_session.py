"""Two graphs as one session: steps near the end of the denoising run in float, all others in INT8.

Near t = 0 the network's output is a small residue that INT8 hits hardest, and nothing after it corrects the error. A
row's timestep decides which graph it runs on, never its place in the run, so any sampler and step count may be used.
"""

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.errors import InputError
from qdm_deploy.runtime.session import StepOutput, StepSession

__all__ = ["MixedSession"]

_LINKS = ("unconditional_row", "owner_row")


class MixedSession:
    """An INT8 session and a float session of the same model; closing it closes both.

    Args:
        int8: runs rows whose timestep is ``float_below`` or larger.
        floating: runs the others.
        float_below: timestep, at least 1.

    Raises:
        InputError: the two take different inputs, or ``float_below`` is smaller than 1.
    """

    def __init__(self, int8: StepSession, floating: StepSession, float_below: int) -> None:
        if float_below < 1:
            raise InputError(f"float_below is {float_below}; give a timestep of at least 1, or open no mixed session")
        if set(int8.input_names) != set(floating.input_names):
            raise InputError(
                f"the INT8 graph takes {', '.join(int8.input_names)} and the float graph "
                f"{', '.join(floating.input_names)}: they are not of the same model"
            )
        self.int8 = int8
        self.floating = floating
        self.float_below = float_below

    @property
    def max_batch(self) -> int | None:
        """The smaller of the two; a batch need not be split."""
        limits = [limit for limit in (self.int8.max_batch, self.floating.max_batch) if limit is not None]
        return min(limits, default=None)

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names that ``run`` wants, in the INT8 graph's order."""
        return self.int8.input_names

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> StepOutput:
        """Run one step; ``StepSession.run`` says what it takes.

        A batch of one kind goes to its session as it is, and the result is that session's. A batch of both kinds is
        split, and its result is in new arrays.

        Raises:
            InputError: what a session refuses, or rows of one sample on different sides of ``float_below``.
            ValueError: the session is closed.
        """
        timestep = inputs.get("timestep")
        if timestep is None or any(array.shape[:1] != timestep.shape for array in inputs.values()):
            return self.int8.run(inputs)  # no batch that could be split: the session says what is wrong with it
        below = timestep < self.float_below
        if not below.any():
            return self.int8.run(inputs)
        if below.all():
            return self.floating.run(inputs)
        _refuse_torn_samples(inputs, below)
        outputs: dict[str, NDArray[np.float32]] = {}
        for session, rows in ((self.int8, np.flatnonzero(~below)), (self.floating, np.flatnonzero(below))):
            result = session.run(_part(inputs, rows))
            for name in ("next_sample", "x0"):
                values = getattr(result, name)
                whole = outputs.setdefault(name, np.empty((len(below), *values.shape[1:]), np.float32))
                whole[rows] = values
        return StepOutput(outputs["next_sample"], outputs["x0"])

    def describe(self) -> dict[str, object]:
        """What the INT8 session says, ``float_below``, and under ``float`` what the float session says."""
        return {**self.int8.describe(), "float_below": self.float_below, "float": self.floating.describe()}

    def close(self) -> None:
        """Close both sessions."""
        try:
            self.int8.close()
        finally:
            self.floating.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _refuse_torn_samples(inputs: Mapping[str, NDArray[Any]], below: NDArray[np.bool_]) -> None:
    """Links must stay inside a part; a link out of the batch is refused here, where it would not be remapped."""
    for name in _LINKS:
        for row, other in enumerate(inputs[name].tolist() if name in inputs else ()):
            if not 0 <= other < len(below):
                raise InputError(f"{name} of row {row} is {other}; rows of this batch are 0 to {len(below) - 1}")
            if below[row] != below[other]:
                timestep = inputs["timestep"]
                raise InputError(
                    f"{name} of row {row} (timestep {timestep[row]}) is {other} (timestep {timestep[other]}); the rows "
                    "of one sample take the same step"
                )


def _part(inputs: Mapping[str, NDArray[Any]], rows: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    """The given rows of every input, contiguous, with links counted from the start of the part."""
    part = {name: np.ascontiguousarray(values[rows]) for name, values in inputs.items()}
    for name in _LINKS:
        if name in part:
            part[name] = np.searchsorted(rows, part[name]).astype(part[name].dtype)
    return part
