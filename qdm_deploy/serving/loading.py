"""From settings to something that runs batches: which sessions are opened, with how many threads, in which sizes."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace

from qdm_deploy.artifacts.bundle import Bundle
from qdm_deploy.backends.opening import choose_backend, open_session
from qdm_deploy.engines.flavour import FLAVOURS
from qdm_deploy.errors import InputError
from qdm_deploy.runtime.cpu import available_cores
from qdm_deploy.runtime.session import StepSession
from qdm_deploy.serving.batch import BatchRunner, batch_sizes
from qdm_deploy.serving.lanes import Lanes, Runner, lane_rows
from qdm_deploy.serving.settings import Settings

__all__ = ["Loaded", "Open", "load", "open_bundle_session"]

Open = Callable[[Bundle, Settings, int | None, int], StepSession]

_LANES = 2
_MOST_SIZES = 16


@dataclass(frozen=True)
class Loaded:
    """A runner that has run: what its sessions say of themselves, and rows of the largest batch."""

    runner: Runner
    backend: dict[str, object]
    max_rows: int


def open_bundle_session(bundle: Bundle, settings: Settings, threads: int | None, sizes: int) -> StepSession:
    """A session as the settings ask for it, with this many threads, that keeps this many batch sizes compiled."""
    return open_session(bundle, settings.backend, precision=settings.precision, threads=threads, kept_batch_sizes=sizes)


def load(bundle: Bundle, settings: Settings, open_: Open, sessions: ExitStack) -> Loaded:
    """Open the sessions and run each allowed batch once.

    Args:
        bundle: an opened bundle.
        settings: what the engine was started with.
        open_: opens one session: of the bundle, for the settings, with these threads, keeping so many batch sizes.
        sessions: closes them.

    Raises:
        InputError: the settings contradict each other.
        QdmError: as ``open_session``.
    """
    # One choice for all sessions, as one of them with all threads would make it.
    backend, precision = choose_backend(bundle, settings.backend, settings.precision, threads=settings.threads)
    settings = replace(settings, backend=backend, precision=precision)
    threads = settings.threads or available_cores()
    # A GPU runs one large batch faster than two halves, and each session there holds an engine.
    most = 1 if backend in FLAVOURS else _LANES
    lanes = min(most, threads, settings.max_rows) if settings.lanes is None else settings.lanes
    if not 1 <= lanes <= min(threads, settings.max_rows):
        raise InputError(
            f"{lanes} lanes cannot share {threads} threads and {settings.max_rows} rows; give one of each a lane"
        )

    def open_runner(threads: int, rows: int) -> tuple[BatchRunner, dict[str, object]]:
        session = sessions.enter_context(open_(bundle, settings, threads, _MOST_SIZES))
        description = session.describe()
        rows = min(rows, session.max_batch or rows)
        sizes = batch_sizes(
            rows, fixed_shapes=description["backend"] != "onnxruntime", deterministic=settings.deterministic
        )
        runner = BatchRunner(session, rows, sizes)
        runner.warm_up()
        return runner, description

    if lanes == 1:
        runner, description = open_runner(threads, settings.max_rows)
        return Loaded(runner, {**description, "lanes": 1}, runner.max_rows)
    rows = lane_rows(settings.max_rows, lanes)
    parts = [open_runner(threads // lanes, rows) for _ in range(lanes)]
    if parts[0][0].max_rows < rows:
        raise InputError(
            f"a session of this backend takes {parts[0][0].max_rows} rows, and a lane {rows}: use one lane"
        )
    # In deterministic mode an image must not meet another number of threads when it is alone.
    alone, description = (None, parts[0][1]) if settings.deterministic else open_runner(threads, min(2, rows))
    return Loaded(Lanes([part for part, _ in parts], alone), {**description, "lanes": lanes}, settings.max_rows)
