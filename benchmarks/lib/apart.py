"""Contenders in processes of their own, which take turns.

In one process they share an allocator, and a runtime's idle threads spin on the cores that the next one needs: a
session looked up to two times slower than where it is alone, as it is in use.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from multiprocessing.connection import Connection
from traceback import format_exc
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.runtime.session import StepOutput, StepSession
from qdm_deploy.runtime.timing import SETTLING, TURN, milliseconds

__all__ = ["Apart", "ApartSession", "Stepper", "opened_apart", "opened_stepper", "timed_apart", "turn_medians"]

K = TypeVar("K")


class Stepper:
    """A session, in its own process."""

    def __init__(self, session: StepSession) -> None:
        """Run steps of ``session``."""
        self.session = session
        self.inputs: Mapping[str, NDArray[Any]] = {}

    def names(self) -> tuple[str, ...]:
        """The inputs that the session wants."""
        return self.session.input_names

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> tuple[NDArray[Any], NDArray[Any]]:
        """One step."""
        result = self.session.run(inputs)
        return result.next_sample, result.x0

    def prepare(self, inputs: Mapping[str, NDArray[Any]]) -> float:
        """Keep these inputs for the turns to come, prepare their batch size, and say what a step takes then."""
        self.inputs = inputs
        self.session.run(inputs)
        return milliseconds(self.session, inputs)

    def turn(self, runs: int, settling: int) -> list[float]:
        """Milliseconds of each of ``runs`` steps in a row, after some that do not count."""
        return [milliseconds(self.session, self.inputs) for _ in range(settling + runs)][settling:]


def opened_stepper(opened: Callable[[], StepSession]) -> Stepper:
    """A stepper of the session that ``opened`` opens."""
    return Stepper(opened())


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

    def __init__(self, apart: Apart) -> None:
        """Ask ``apart`` for steps."""
        self._apart = apart
        self.input_names: tuple[str, ...] = apart.ask("names")

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> StepOutput:
        """One step."""
        return StepOutput(*self._apart.ask("run", dict(inputs)))


def opened_apart(makers: Mapping[K, Callable[[], object]], *, at_once: int = 1) -> dict[K, Apart]:
    """An ``Apart`` of each, so many opening beside each other; whoever asks closes them."""
    with ThreadPoolExecutor(at_once) as pool:
        return dict(zip(makers, pool.map(Apart, makers.values()), strict=True))


def timed_apart(
    steppers: Mapping[K, Apart], inputs: Mapping[str, NDArray[Any]], *, runs: int, seconds: float, at_once: int = 1
) -> dict[K, list[float]]:
    """Milliseconds of one step, ``runs`` times for each ``Stepper``, a few in a row, round after round.

    Args:
        steppers: who runs.
        inputs: of the step.
        runs: how often each is timed.
        seconds: what that may take; where it would take longer, as many runs as fit are timed, one after the other.
        at_once: how many prepare the batch size beside each other, before the turns.
    """
    wanted = {name: {key: inputs[key] for key in stepper.ask("names")} for name, stepper in steppers.items()}
    if at_once > 1:
        with ThreadPoolExecutor(at_once) as pool:
            list(pool.map(lambda name: steppers[name].ask("prepare", wanted[name]), steppers))
    first = {name: stepper.ask("prepare", wanted[name]) for name, stepper in steppers.items()}
    round_s = sum(first.values()) / 1000
    fit = int(seconds / round_s)
    turns = _turns(runs) if fit >= runs * (1 + SETTLING / TURN) else [(1, 0)] * min(runs, max(fit, 1))
    times: dict[K, list[float]] = {name: [] for name in steppers}
    for count, settling in turns:
        for name, stepper in steppers.items():
            times[name] += stepper.ask("turn", count, settling)
    return times


def turn_medians(times: Sequence[float]) -> NDArray[np.float64]:
    """Of ``timed_apart``'s milliseconds, the median of each turn: what belongs to the same stretch of time."""
    return np.asarray([np.median(times[start : start + TURN]) for start in range(0, len(times), TURN)])


def _turns(runs: int) -> Sequence[tuple[int, int]]:
    return [(min(TURN, runs - done), SETTLING) for done in range(0, runs, TURN)]
