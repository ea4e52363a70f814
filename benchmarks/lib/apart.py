"""Contenders in processes of their own, which take turns.

In one process they share an allocator, and a runtime's idle threads spin on the cores that the next one needs: a
session looked up to two times slower than where it is alone, as it is in use.
"""

from collections.abc import Callable, Mapping, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from traceback import format_exc
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.artifacts.step_interface import StepInterface
from qdm_deploy.runtime.session import StepOutput, StepSession
from qdm_deploy.runtime.timing import SETTLING, TURN, milliseconds

K = TypeVar("K")
Inputs = Mapping[str, NDArray[Any]]


class Stepper:
    """A session, in its own process."""

    def __init__(self, opened: Callable[[], StepSession]) -> None:
        """Run steps of the session that ``opened`` opens."""
        self.session = opened()
        self.inputs: Inputs = {}

    def names(self) -> tuple[str, ...]:
        """The inputs that the session wants."""
        return self.session.interface.input_names

    def run(self, inputs: Inputs) -> tuple[NDArray[Any], ...]:
        """One step."""
        result = self.session.run(inputs)
        return result.next_sample, result.x0, result.next_history

    def prepare(self, inputs: Inputs) -> float:
        """Keep these inputs for the turns to come, prepare their batch size, and say what a step takes then."""
        self.inputs = inputs
        self.session.run(inputs)
        return milliseconds(self.session, inputs)

    def turn(self, runs: int, settling: int) -> list[float]:
        """Milliseconds of each of ``runs`` steps in a row, after some that do not count."""
        return [milliseconds(self.session, self.inputs) for _ in range(settling + runs)][settling:]


class Apart:
    """An object in a process of its own; ``ask`` calls its methods.

    Args:
        made: makes the object, there: a module's function or a ``partial`` of one, for it is sent over.
    """

    def __init__(self, made: Callable[[], object]) -> None:
        context = get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, made), daemon=True)
        self._process.start()
        other.close()
        self._answer()

    def ask(self, method: str, *arguments: Any) -> Any:
        """The result of a method.

        Raises:
            RuntimeError: it raised, or the process is gone.
        """
        self._pipe.send((method, arguments))
        return self._answer()

    def _answer(self) -> Any:
        try:
            error, result = self._pipe.recv()
        except EOFError as gone:
            raise RuntimeError(f"a contender's process ended with {self._process.exitcode}") from gone
        if error is not None:
            raise RuntimeError(error)
        return result

    def __enter__(self) -> Self:
        """The object itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join()


def _serve(pipe: Connection, made: Callable[[], object]) -> None:
    try:
        target = made()
        pipe.send((None, None))
        while True:
            method, arguments = pipe.recv()
            pipe.send((None, getattr(target, method)(*arguments)))
    except (EOFError, KeyboardInterrupt):  # the other end was closed, or both are interrupted
        return
    except Exception:  # noqa: BLE001 - the other end raises it
        pipe.send((format_exc(), None))


class ApartSession:
    """A ``Stepper`` elsewhere as a session here, for what is not timed."""

    max_batch = None

    def __init__(self, apart: Apart, interface: StepInterface) -> None:
        """Ask ``apart`` for steps of a graph with that interface."""
        self._apart, self.interface = apart, interface

    def run(self, inputs: Inputs) -> StepOutput:
        """One step."""
        return StepOutput(*self._apart.ask("run", dict(inputs)))


def timed_apart(
    steppers: Mapping[K, Apart], inputs: Mapping[K, Inputs], *, runs: int, seconds: float
) -> dict[K, list[float]]:
    """Milliseconds of one step, ``runs`` times for each ``Stepper``, a few in a row, round after round.

    Args:
        steppers: who runs.
        inputs: of each one's step; it takes of them what it wants.
        runs: how often each is timed.
        seconds: what that may take; where it would take longer, as many runs as fit are timed, one after the other.
    """
    first: dict[K, float] = {}
    for key, stepper in steppers.items():
        wanted = stepper.ask("names")
        first[key] = stepper.ask("prepare", {name: inputs[key][name] for name in wanted})
    fit = int(1000 * seconds / sum(first.values()))
    turns = [(min(TURN, runs - done), SETTLING) for done in range(0, runs, TURN)]
    if fit < runs * (1 + SETTLING / TURN):
        turns = [(1, 0)] * min(runs, max(fit, 1))
    times: dict[K, list[float]] = {key: [] for key in steppers}
    for count, settling in turns:
        for key, stepper in steppers.items():
            times[key] += stepper.ask("turn", count, settling)
    return times


def turn_medians(times: Sequence[float]) -> NDArray[np.float64]:
    """Of ``timed_apart``'s milliseconds, the median of each turn: what belongs to the same stretch of time."""
    return np.asarray([np.median(times[start : start + TURN]) for start in range(0, len(times), TURN)])
