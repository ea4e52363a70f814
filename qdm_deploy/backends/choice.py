"""What runs a bundle fastest on this machine: measured once, then remembered.

Which backend wins, and whether INT8 beats float at all, depends on the CPU's instruction sets, on the core count and on
the model, so it is timed rather than guessed: one step of a few rows on every candidate, in turn. What was found is
kept per bundle and machine; a machine where nothing can be kept measures each time.
"""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qdm_deploy.artifacts.bundle import Bundle
from qdm_deploy.artifacts.cache_folder import cache_folder
from qdm_deploy.artifacts.files import canonical_json, new_file
from qdm_deploy.errors import EnvironmentProblem, InputError, ResourceProblem
from qdm_deploy.progress import SILENT, Progress
from qdm_deploy.runtime.cpu import available_cores, cpu_flags, cpu_model
from qdm_deploy.runtime.session import StepSession
from qdm_deploy.runtime.timing import timed_in_turn
from qdm_deploy.samplers.random_inputs import random_inputs

__all__ = ["Candidate", "Choice", "choose", "fastest"]

Precision = Literal["int8", "float"]
Candidate = tuple[str, Precision]

_ROWS = 4
_RUNS = 10
_SECONDS = 60.0
# A candidate must win by more than the spread of such short runs to displace the one that stands before it.
_MARGIN = 1.03


class Choice(BaseModel):
    """What was taken, and what it was compared with.

    Attributes:
        backend, precision: what was taken.
        milliseconds: median of one step of ``rows`` rows, by "backend precision".
        rows: rows of the measured batch.
        reason: one sentence for people.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    backend: str
    precision: Precision
    milliseconds: dict[str, float] = Field(min_length=1)
    rows: int
    reason: str


def choose(
    bundle: Bundle,
    candidates: Sequence[Candidate],
    opened: Callable[[Candidate], StepSession],
    identity: Sequence[str],
    *,
    threads: int | None = None,
    folder: Path | None = None,
    progress: Progress = SILENT,
) -> Choice:
    """The fastest of some ways to run a bundle here.

    Args:
        bundle: what runs.
        candidates: backend and precision; earlier ones win ties.
        opened: opens one; every session is closed again.
        identity: versions and whatever else changes the times, beside CPU, threads and bundle.
        threads: CPU threads, as the sessions are opened with.
        folder: where choices are kept; None takes the machine's cache folder.
        progress: told what was chosen and why.
    """
    kept = _place(folder, f"{_key(bundle, candidates, identity, threads)}.json")
    choice = None if kept is None else _remembered(kept, candidates)
    if choice is None:
        progress.say("Timing the ways to run this bundle here, once")
        with ExitStack() as stack:
            sessions = {candidate: stack.enter_context(opened(candidate)) for candidate in candidates}
            times = timed_in_turn(
                sessions, random_inputs(bundle.pipeline.denoiser, _ROWS), runs=_RUNS, seconds=_SECONDS
            )
        choice = fastest({candidate: median(values) for candidate, values in times.items()})
        if kept is not None:
            _remember(kept, choice)
    progress.say(choice.reason)
    return choice


def fastest(milliseconds: dict[Candidate, float]) -> Choice:
    """The choice that follows from the times, in the order of preference."""
    order = iter(milliseconds)
    best = next(order)
    for candidate in order:
        if milliseconds[candidate] * _MARGIN < milliseconds[best]:
            best = candidate
    return Choice(
        backend=best[0],
        precision=best[1],
        milliseconds={_name(candidate): round(time, 3) for candidate, time in milliseconds.items()},
        rows=_ROWS,
        reason=_reason(best, milliseconds),
    )


def _reason(best: Candidate, milliseconds: dict[Candidate, float]) -> str:
    others = sorted((time, candidate) for candidate, time in milliseconds.items() if candidate != best)
    told = ", ".join(f"{_name(candidate)} {time:.1f} ms" for time, candidate in others)
    text = f"{_name(best)} is the fastest here: {milliseconds[best]:.1f} ms a step at batch {_ROWS}; {told}"
    if best[1] == "float" and any(precision == "int8" for _, precision in milliseconds):
        text += ". INT8 does not pay on this machine; --precision int8 takes it all the same"
    return text


def _name(candidate: Candidate) -> str:
    return " ".join(candidate)


def _key(bundle: Bundle, candidates: Sequence[Candidate], identity: Sequence[str], threads: int | None) -> str:
    machine = {
        "cpu": cpu_model(),
        "flags": sorted(cpu_flags()),
        "threads": threads or available_cores(),
        "identity": list(identity),
    }
    document = {
        "format": 2,
        "bundle": bundle.id,
        "candidates": [_name(candidate) for candidate in candidates],
        "machine": machine,
    }
    return hashlib.sha256(canonical_json(document)).hexdigest()


def _place(folder: Path | None, name: str) -> Path | None:
    try:
        return (folder or cache_folder("choices")) / name
    except EnvironmentProblem:
        return None


def _remembered(path: Path, candidates: Sequence[Candidate]) -> Choice | None:
    """The kept choice; whatever is wrong with it, it can be measured again."""
    try:
        choice = Choice.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
    return choice if (choice.backend, choice.precision) in candidates else None


def _remember(path: Path, choice: Choice) -> None:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with new_file(path) as temporary:
            temporary.write_text(choice.model_dump_json(indent=1) + "\n", encoding="utf-8")
    except (EnvironmentProblem, InputError, OSError, ResourceProblem):
        # A read-only machine measures each time: a few seconds, and nothing else is lost.
        return
