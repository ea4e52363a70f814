"""One denoising step on some backend: what every session promises, and the checks that all of them share.

A session runs the step graph: ``sample``, ``timestep``, ``coefficients``, ``noise`` and ``previous_x0`` (and, for a
conditional model, its conditioning with ``guidance``, ``unconditional_row`` and ``owner_row``) to ``next_sample`` and
``x0``. The first axis of every tensor is the row of the batch.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.errors import BundleError, InputError

__all__ = ["StepInputs", "StepLoop", "StepOutput", "StepSession", "TensorSpec", "check_inputs", "step_graph_inputs"]

OUTPUTS = ("next_sample", "x0")
_ALWAYS = ("sample", "timestep", "coefficients", "noise", "previous_x0")
_GUIDED = ("guidance", "unconditional_row", "owner_row")
ROW_INPUTS = ("unconditional_row", "owner_row")


@dataclass(frozen=True)
class StepOutput:
    """Result of one step, in the session's own memory: copy what must live longer.

    After the session's next ``run`` the arrays hold something else, and after its ``close`` they must not be touched.

    Attributes:
        next_sample: [B, C, H, W] float32, the sample one step less noisy.
        x0: [B, C, H, W] float32, the clean sample predicted in this step.
    """

    next_sample: NDArray[np.float32]
    x0: NDArray[np.float32]


class StepSession(Protocol):
    """A loaded step graph. Not thread-safe: one session serves one thread at a time."""

    @property
    def max_batch(self) -> int | None:
        """Rows one ``run`` may carry; None when only memory limits them."""
        ...

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names that ``run`` wants, in the graph's order."""
        ...

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> StepOutput:
        """Run one step.

        Args:
            inputs: exactly ``input_names``, with the graph's dtypes, all with the same number of rows. They are only
                read, and are the caller's again when the call returns. They must not overlap an earlier result.

        Raises:
            InputError: a name, dtype, shape or row number that the graph does not take.
            ValueError: the session is closed.
        """
        ...

    def describe(self) -> dict[str, object]:
        """What ran, as JSON values: backend, version, threads, precision, hash of the graph. No times, no paths."""
        ...

    def close(self) -> None:
        """Give back the backend's memory; closing twice is allowed."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


@dataclass(frozen=True)
class StepInputs:
    """What the host makes anew for a step of a loop.

    Attributes:
        timestep: [B] int64.
        coefficients: [B, K] float32.
        noise: [B, C, H, W] float32, or None in a step that uses none (its coefficient d is 0).
    """

    timestep: NDArray[np.int64]
    coefficients: NDArray[np.float32]
    noise: NDArray[np.float32] | None = None


@runtime_checkable
class StepLoop(Protocol):
    """A session that can keep the sampler's state where it computes, from one step to the next."""

    def run_steps(self, inputs: Mapping[str, NDArray[Any]], steps: Iterable[StepInputs]) -> StepOutput:
        """Run a loop: each step's ``next_sample`` and ``x0`` are the ``sample`` and ``previous_x0`` of the next.

        Args:
            inputs: as for ``run``: the state the loop starts from. Timestep, coefficients and noise are those of the
                steps instead.
            steps: one entry per step. The next one is asked for while earlier ones may still run; an entry's arrays
                may be filled anew then.

        Returns:
            The last step's result.

        Raises:
            InputError: what the graph does not take, or no step at all.
            ValueError: the session is closed.
        """
        ...


@dataclass(frozen=True)
class TensorSpec:
    """An input as the graph declares it; ``shape`` is that of one row, without the batch axis."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


def step_graph_inputs(
    graph: Path, inputs: Sequence[tuple[str, np.dtype[Any] | None, Sequence[int | None]]], outputs: Sequence[str]
) -> tuple[TensorSpec, ...]:
    """The inputs of a step graph, or a refusal of an ONNX file that loads but is no step graph.

    Args:
        graph: the file, for messages.
        inputs: name, dtype (None: neither float32 nor int64) and shape (None: an axis of any size) as the backend
            reads them.
        outputs: names.

    Raises:
        BundleError: an input or output is missing, or an input has another dtype or other dynamic axes than the batch.
    """
    names = [name for name, _, _ in inputs]
    wanted = [*_ALWAYS, *(_GUIDED if set(names).intersection(_GUIDED) else ())]
    problems = [f"it has no {name}" for name in wanted if name not in names]
    problems += [f"it has no {name}" for name in OUTPUTS if name not in outputs]
    specs = []
    for name, dtype, shape in inputs:
        fixed = tuple(axis for axis in shape[1:] if axis is not None)
        if dtype is None:
            problems.append(f"{name} is neither float32 nor int64")
        elif not shape or shape[0] is not None or len(fixed) != len(shape) - 1:
            problems.append(
                f"{name} has the shape {list(shape)}, and only its first axis, the batch, should be dynamic"
            )
        else:
            specs.append(TensorSpec(name, dtype, fixed))
    if problems:
        raise BundleError(
            f"{graph} is not a step graph: {'; '.join(problems)}. Build the bundle again with this version."
        )
    return tuple(specs)


def check_inputs(specs: Sequence[TensorSpec], inputs: Mapping[str, NDArray[Any]], max_batch: int | None) -> int:
    """Refuse inputs that a backend would misread or crash on, and return their number of rows.

    Raises:
        InputError: the names are not those of the graph, or a dtype, shape or row number is wrong.
    """
    names = [spec.name for spec in specs]
    if set(inputs) != set(names):
        missing = [name for name in names if name not in inputs]
        unknown = sorted(set(inputs).difference(names))
        raise InputError(
            f"the step graph takes {', '.join(names)}; missing: {', '.join(missing) or 'none'}; "
            f"unknown: {', '.join(unknown) or 'none'}"
        )
    first = inputs[names[0]]
    rows = first.shape[0] if first.ndim else 0
    if rows < 1 or (max_batch is not None and rows > max_batch):
        allowed = "at least 1" if max_batch is None else f"1 to {max_batch}"
        raise InputError(f"{names[0]} has {rows} rows; one run takes {allowed}")
    for spec in specs:
        given = inputs[spec.name]
        if given.dtype != spec.dtype or given.shape != (rows, *spec.shape):
            raise InputError(
                f"{spec.name} is {given.dtype} {list(given.shape)}; the step graph takes {spec.dtype} "
                f"{[rows, *spec.shape]}"
            )
    for name in ROW_INPUTS:
        # Backends differ in what a wrong row gathers: an error, zeros, or memory of another request.
        if name in inputs and (inputs[name].min() < 0 or inputs[name].max() >= rows):
            raise InputError(f"{name} holds {inputs[name].tolist()}; rows of this batch are 0 to {rows - 1}")
    return rows
