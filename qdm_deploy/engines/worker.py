"""The build in a process of its own, because the builder is native code that can crash.

``run_build`` starts this module (see ``qdm_deploy.child_process``), hands it the request and hears of phases, then of
the outcome. A crash of the child becomes an ``EngineError`` here. Ctrl-C reaches only the parent, which kills it.
"""

import contextlib
import errno
import signal
import sys
import time
from typing import Any

from qdm_deploy.child_process import Child, Parent, error_of, how_it_ended
from qdm_deploy.engines.builder import build_plan
from qdm_deploy.engines.request import BuildRequest
from qdm_deploy.errors import EngineError, EnvironmentProblem, QdmError, ResourceProblem
from qdm_deploy.progress import SILENT, Advance, Progress

__all__ = ["run_build"]

_QUIET_SECONDS = 1.0
_TAIL_LINES = 5


def run_build(request: BuildRequest, *, progress: Progress = SILENT) -> float:
    """Build an engine in a child process.

    Args:
        request: What to build; the child writes its files, and its log also gets what native code prints.
        progress: A task that counts the steps of the builder's outermost phase, and a line for a phase that began a
            second or more after the line before it.

    Returns:
        Seconds the build took, without the start of the process.

    Raises:
        EnvironmentProblem: The library or its GPU is missing.
        EngineError: The graph cannot be built, or the builder crashed.
        ResourceProblem: The build was killed from outside, as the system does when memory runs out.
    """
    outcome: dict[str, Any] = {}
    phases = _Phases(f"{request.backend} engine", progress)
    with request.log.open("ab") as log, Child("qdm_deploy.engines.worker", stderr=log) as child:
        child.tell("build", request=request.model_dump_json())
        with phases.bar:
            for outcome in child.frames():
                if outcome["kind"] == "phase":
                    phases.reached(outcome["phase"], outcome["steps"], outcome["done"])
        status = child.wait()
    if status == 0 and outcome.get("kind") == "built":
        return float(outcome["seconds"])
    if status == 0 and outcome.get("kind") == "error":
        raise error_of(outcome)
    raise _crash(request, status, phases.phase)


class _Phases:
    """Shows the phases of a build: a bar over the steps of the outermost, a line now and then for the rest."""

    def __init__(self, description: str, progress: Progress) -> None:
        self.phase = "starting"
        self.bar = contextlib.ExitStack()
        self._description = description
        self._progress = progress
        self._started = self._said = time.monotonic()
        self._advance: Advance | None = None
        self._outermost = ""
        self._done = 0

    def reached(self, phase: str, steps: int, done: int) -> None:
        """``done`` of the ``steps`` (0: unknown) of a phase are behind us."""
        if self._advance is None and steps:
            self._advance = self.bar.enter_context(self._progress.task(self._description, steps))
            self._outermost = phase
        if self._advance is not None and phase == self._outermost and done > self._done:
            self._advance(done - self._done)
            self._done = done
        now = time.monotonic()
        if phase != self.phase and now - self._said >= _QUIET_SECONDS:
            self._progress.say(f"{now - self._started:.0f} s: {phase}")
            self._said = now
        self.phase = phase


def _crash(request: BuildRequest, status: int, phase: str) -> QdmError:
    lines = request.log.read_text(encoding="utf-8", errors="replace").splitlines()
    tail = "\n  ".join(line[:300] for line in lines[-_TAIL_LINES:]) or "(nothing)"
    how = f"{how_it_ended(status)} while {phase}"
    if status == -signal.SIGKILL:
        return ResourceProblem(
            f"the build of {request.graph} {how}; lower the largest batch of the profile ({request.profile}) or build "
            "on a larger machine"
        )
    return EngineError(
        f"the {request.backend} builder {how}, building {request.graph}. One known cause is a QuantizeLinear whose "
        f"scale is computed at run time: scales must be constants. The last lines of its log:\n  {tail}"
    )


def main() -> None:
    """The child: read the request, build, report."""
    parent = Parent(sys.argv[-1])
    header, _ = parent.receive()
    request = BuildRequest.model_validate_json(header["request"])
    try:
        seconds = build_plan(
            request, lambda phase, steps, done: parent.tell("phase", phase=phase, steps=steps, done=done)
        )
        parent.tell("built", seconds=seconds)
    except QdmError as error:
        parent.tell_error(error)
    except OSError as error:
        kind = ResourceProblem if error.errno in (errno.ENOSPC, errno.EDQUOT) else EnvironmentProblem
        parent.tell_error(
            kind(f"the engine cannot be written to {request.plan} ({error.strerror}); see to the cache's disk")
        )


if __name__ == "__main__":
    main()
