"""One denoising step on some backend: what every session promises, and the checks that all of them share.

A session runs a step graph, whose inputs and outputs its ``interface`` says
(``qdm_deploy.artifacts.step_interface``). The first axis of every tensor is the row of the batch.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from qdm_deploy.artifacts.step_interface import DType, StepInterface, TensorSpec, role_of_input
from qdm_deploy.errors import BundleError, InputError

__all__ = ["StepInputs", "StepLoop", "StepOutput", "StepSession", "check_inputs", "check_tensor", "interface_of_graph"]


@dataclass(frozen=True)
class StepOutput:
    """Result of one step, in the session's own memory: copy what must live longer.

    After the session's next ``run`` the arrays hold something else, and after its ``close`` they must not be touched.

    Attributes:
        next_sample: [B, C, H, W] float32, the sample one step less noisy.
        x0: [B, C, H, W] float32, the clean sample predicted in this step.
        next_history: [B, 3C, H, W] float32, what the sampler remembers of this step and those before.
    """

    next_sample: NDArray[np.float32]
    x0: NDArray[np.float32]
    next_history: NDArray[np.float32]

    def copy_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Write what the next step starts from into the caller's arrays ``sample`` and ``history``."""
        np.copyto(state["sample"], self.next_sample)
        np.copyto(state["history"], self.next_history)


class StepSession(Protocol):
    """A loaded step graph. Not thread-safe: one session serves one thread at a time."""

    @property
    def max_batch(self) -> int | None:
        """Rows one ``run`` may carry; None when only memory limits them."""
        ...

    @property
    def interface(self) -> StepInterface:
        """What ``run`` wants and gives, as the graph declares it."""
        ...

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> StepOutput:
        """Run one step.

        Args:
            inputs: exactly those of ``interface``, with its dtypes, all with the same number of rows. They are only
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
        timestep: [B], of the interface's dtype.
        coefficients: [B, K] float32.
        noise: [B, C, H, W] float32, or None in a step that uses none (its coefficient d is 0).
    """

    timestep: NDArray[Any]
    coefficients: NDArray[np.float32]
    noise: NDArray[np.float32] | None = None


@runtime_checkable
class StepLoop(Protocol):
    """A session that can keep the sampler's state where it computes, from one step to the next."""

    def run_steps(self, inputs: Mapping[str, NDArray[Any]], steps: Iterable[StepInputs]) -> StepOutput:
        """Run a loop: each step's state outputs are the state inputs of the next.

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


Axes = Sequence[int | None]
_IMAGES = frozenset({"state", "noise"})


def interface_of_graph(
    graph: Path,
    inputs: Sequence[tuple[str, DType | None, Axes]],
    outputs: Sequence[tuple[str, DType | None, Axes]],
    size: tuple[int, int] | None = None,
) -> StepInterface:
    """The interface of a step graph, or a refusal of an ONNX file that loads but is no step graph.

    Args:
        graph: the file, for messages.
        inputs: name, dtype (None: neither float32 nor int64) and shape (None: an axis of any size) as the backend
            reads them.
        outputs: the same of the outputs.
        size: height and width of the sample, for a graph that leaves them open.

    Raises:
        BundleError: an input or output is missing, or one has another dtype or other open axes than the batch, the
            height and the width.
    """
    problems: list[str] = []

    def spec(name: str, dtype: DType | None, shape: Axes, *, is_input: bool) -> TensorSpec | None:
        role = role_of_input(name) if is_input else None
        spatial = len(shape) == 4 and (role in _IMAGES or not is_input)
        axes = [*shape[:-2], *size] if spatial and size is not None else list(shape)
        fixed = tuple(axis for axis in axes[1:] if axis is not None)
        if dtype is None:
            problems.append(f"{name} is neither float32 nor int64")
        elif not axes or axes[0] is not None or len(fixed) != len(axes) - 1:
            problems.append(f"{name} has the shape {list(shape)}, and only its first axis, the batch, should be open")
        else:
            neutral = 1.0 if name == "guidance" else 0.0
            return TensorSpec(name=name, dtype=dtype, row_shape=fixed, role=role, neutral=neutral, spatial=spatial)
        return None

    taken = [spec(*item, is_input=True) for item in inputs]
    given = [spec(*item, is_input=False) for item in outputs]
    if not problems:
        try:
            return StepInterface(
                inputs=tuple(item for item in taken if item is not None),
                outputs=tuple(item for item in given if item is not None),
            )
        except ValidationError as error:
            problems = [str(problem["msg"]).removeprefix("Value error, ") for problem in error.errors()]
    raise BundleError(f"{graph} is not a step graph: {'; '.join(problems)}. Build the bundle again with this version.")


def check_inputs(interface: StepInterface, inputs: Mapping[str, NDArray[Any]], max_batch: int | None) -> int:
    """Refuse inputs that a backend would misread or crash on, and return their number of rows.

    Raises:
        InputError: the names are not those of the graph, or a dtype, shape or row number is wrong.
    """
    names = interface.input_names
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
    for spec in interface:
        check_tensor(spec, inputs[spec.name], rows)
    for spec in interface.of_role("link"):
        # Backends differ in what a wrong row gathers: an error, zeros, or memory of another request.
        given = inputs[spec.name]
        if given.min() < 0 or given.max() >= rows:
            raise InputError(f"{spec.name} holds {given.tolist()}; rows of this batch are 0 to {rows - 1}")
    return rows


def check_tensor(spec: TensorSpec, given: NDArray[Any], rows: int, where: str = "") -> None:
    """Refuse an array of another dtype or shape; ``where`` goes behind its name in the message.

    Raises:
        InputError: with both.
    """
    if given.dtype != spec.numpy_dtype or given.shape != (rows, *spec.row_shape):
        raise InputError(
            f"{spec.name}{where} is {given.dtype} {list(given.shape)}; the step graph takes {spec.dtype} "
            f"{[rows, *spec.row_shape]}"
        )
