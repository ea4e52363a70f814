"""The build in a process of its own, because the builder is native code that can crash.

``run_build`` starts ``python -m qdm_deploy.engines.worker``, hands it the request as one JSON line and reads one JSON
object per line back: phases, then the outcome. A crash of the child becomes an ``EngineError`` here. The child leads a
session of its own, so Ctrl-C reaches only the parent, which kills it; and it ends by itself when its parent is gone.
"""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from typing import IO, Any, cast

from qdm_deploy import errors
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
    with request.log.open("ab") as log:
        child = _started(log)
        with child:
            try:
                _send(child, request)
                with phases.bar:
                    for line in cast(IO[str], child.stdout):
                        outcome = json.loads(line)
                        if "phase" in outcome:
                            phases.reached(**outcome)
                status = child.wait()
            finally:
                child.kill()
    if status == 0 and "seconds" in outcome:
        return float(outcome["seconds"])
    if status == 0 and "failed" in outcome:
        kind = getattr(errors, outcome["failed"])
        raise kind(outcome["message"])
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


def _started(log: IO[bytes]) -> "subprocess.Popen[str]":
    # The child imports what this process imports, from wherever this process does; -P keeps the current folder out.
    folders = [os.path.abspath(folder) for folder in sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    command = [sys.executable, "-P", "-m", "qdm_deploy.engines.worker"]
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        encoding="utf-8",
        env=environment,
        start_new_session=True,
    )


def _send(child: "subprocess.Popen[str]", request: BuildRequest) -> None:
    stream = cast(IO[str], child.stdin)
    # A child that cannot even start breaks the pipe; its exit status says so, and its log says why.
    try:
        stream.write(request.model_dump_json() + "\n")
        stream.flush()  # and left open: its end tells the child that we are gone
    except BrokenPipeError:
        # What could not be sent is still in the buffer, and closing tries once more.
        with contextlib.suppress(BrokenPipeError):
            stream.close()


def _crash(request: BuildRequest, status: int, phase: str) -> QdmError:
    lines = request.log.read_text(encoding="utf-8", errors="replace").splitlines()
    tail = "\n  ".join(line[:300] for line in lines[-_TAIL_LINES:]) or "(nothing)"
    if status == -signal.SIGKILL:
        return ResourceProblem(
            f"the build of {request.graph} was killed (SIGKILL) while {phase}: usually the system ran out of memory; "
            f"lower the largest batch of the profile ({request.profile}) or build on a larger machine"
        )
    how = f"crashed with {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"
    return EngineError(
        f"the {request.backend} builder {how} while {phase}, building {request.graph}. One known cause is a "
        "QuantizeLinear whose scale is computed at run time: scales must be constants. The last lines of its log:\n  "
        f"{tail}"
    )


def main() -> None:
    """The child: read the request, build, report."""
    # Native code prints where it likes; only our events may reach the pipe.
    with os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8") as events:
        os.dup2(2, 1)

        def report(**event: object) -> None:
            events.write(json.dumps(event) + "\n")

        request = BuildRequest.model_validate_json(sys.stdin.readline())
        threading.Thread(target=_end_with_parent, daemon=True).start()
        try:
            seconds = build_plan(request, lambda phase, steps, done: report(phase=phase, steps=steps, done=done))
            report(seconds=seconds)
        except QdmError as error:
            report(failed=type(error).__name__, message=str(error))
        except OSError as error:
            kind = ResourceProblem if error.errno in (errno.ENOSPC, errno.EDQUOT) else EnvironmentProblem
            message = f"the engine cannot be written to {request.plan} ({error.strerror}); see to the cache's disk"
            report(failed=kind.__name__, message=message)


def _end_with_parent() -> None:
    while os.read(0, 1):  # not sys.stdin: a thread waiting inside it would block the end of the interpreter
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
