"""One worker: makes the missing shards of its place, one after the other, and commits each.

A shard is written beside its name, flushed, renamed, and marked. Killed at any point, a worker loses the shard in work
and nothing else. Two workers that make the same shard make the same bytes, and the one that is later finds the marker.
"""

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from qdm_deploy.artifacts.bundle import Bundle
from qdm_deploy.artifacts.files import disk_problems
from qdm_deploy.backends.opening import automatic_backend, open_session
from qdm_deploy.batch.formats import is_folder, write_shard
from qdm_deploy.batch.job import Job, Shard, job_of, join_job, threads_for
from qdm_deploy.batch.marker import Marker, digest_of, forget, intact, read_marker, size_of, write_marker
from qdm_deploy.batch.options import BatchOptions
from qdm_deploy.batch.pictures import PictureSource
from qdm_deploy.batch.place import Place
from qdm_deploy.batch.staging import locked, publish, staged, sweep
from qdm_deploy.batch.stopping import Stopped, Stopping
from qdm_deploy.components.encoders import open_encoder
from qdm_deploy.errors import CheckFailed, TryAgain
from qdm_deploy.progress import SILENT, Progress
from qdm_deploy.runtime.cpu import cpu_model

__all__ = ["PlaceResult", "commit", "run_place"]


@dataclass(frozen=True)
class PlaceResult:
    """What one worker did.

    Attributes:
        made: shards that it made.
        images: pictures in them.
        there: shards of its place that were whole before, or that another worker made meanwhile.
        seconds: time in which it made them; ``images / seconds`` is its throughput.
        engine: ``StepSession.describe``.
    """

    made: int
    images: int
    there: int
    seconds: float
    engine: dict[str, object]


def run_place(options: BatchOptions, place: Place, progress: Progress = SILENT) -> PlaceResult:
    """Make the shards of a place that are not there yet.

    Raises:
        InputError: the job cannot be made, or the folder belongs to another job.
        TryAgain: SIGTERM or SIGUSR1 came; what was committed stays.
        ResourceProblem: the disk is full; what was committed stays.
        QdmError: see ``qdm_deploy.errors``.
    """
    tally = _Tally()
    with Stopping(options.grace) as stopping:
        try:
            return _run(options, place, stopping, tally, progress)
        except Stopped:
            name = stopping.asked.name if stopping.asked is not None else "a signal"
            raise TryAgain(tally.left(f"stopped by {name}")) from None
        except KeyboardInterrupt as error:
            raise type(error)(tally.left("stopped")) from None


class _Tally:
    """How many shards of the place are whole."""

    def __init__(self) -> None:
        self.whole = 0
        self.all = 0

    def left(self, what: str) -> str:
        """What an interruption left, for its message."""
        return f"{what}; {self.whole} of {self.all} shards are complete: run the same command again to go on"


def _run(options: BatchOptions, place: Place, stopping: Stopping, tally: _Tally, progress: Progress) -> PlaceResult:
    bundle = Bundle.open(options.bundle)
    encoder = open_encoder(bundle.pipeline, options.conditioning_file, root=bundle.path)
    threads = threads_for(options, 1)
    # Not the one that is timed as the fastest: all workers must take the same one, on every machine.
    backend = automatic_backend(bundle.manifest.targets) if options.backend == "auto" else options.backend
    with open_session(bundle, backend, precision=options.precision, threads=threads, mode="throughput") as session:
        engine = dict(session.describe())
        job = job_of(options, bundle, engine, encoder)
        source = PictureSource(session, bundle, job, encoder, threads=threads)
        with disk_problems(options.out):
            options.out.mkdir(parents=True, exist_ok=True)
        for path in sweep(options.out):
            progress.say(f"removed {path.name}, which a run left that was killed")
        join_job(options.out, job)
        mine = [job.shard(number) for number in range(place.rank, job.shards, place.world)]
        missing = [shard for shard in mine if intact(options.out, job, shard) is None]
        tally.whole, tally.all = len(mine) - len(missing), len(mine)
        start = time.perf_counter()
        total = sum(shard.count for shard in missing)
        with progress.task(f"Generating images on {engine['backend']}", total) as advance:
            made = []
            for shard in missing:
                pace = _Pace(shard.count, stopping, advance)  # first: a signal after the check must find it
                stopping.check()
                if _make(options, job, shard, pace, source):
                    made.append(shard)
                tally.whole += 1
    images = sum(shard.count for shard in made)
    return PlaceResult(len(made), images, len(mine) - len(made), time.perf_counter() - start, engine)


class _Pace:
    """Follows the pictures of one shard, and tells when it will be done."""

    def __init__(self, count: int, stopping: Stopping, advance: Callable[[int], None]) -> None:
        self._count = count
        self._done = 0
        self._stopping = stopping
        self._advance = advance
        self._start = time.perf_counter()
        stopping.expect(None)

    @property
    def seconds(self) -> float:
        """Since the start of the shard."""
        return time.perf_counter() - self._start

    def made(self, count: int) -> None:
        """So many pictures more."""
        self._done += count
        self._advance(count)
        self._stopping.expect((self._count - self._done) * self.seconds / self._done)


def _make(options: BatchOptions, job: Job, shard: Shard, pace: _Pace, source: PictureSource) -> bool:
    """Make one shard; False where another worker was faster."""
    out = options.out
    with locked(out):
        if intact(out, job, shard) is not None:
            pace.made(shard.count)
            return False
        forget(out, shard)  # a marker that is there is of a shard that was damaged since
    with staged(out / shard.name, folder=is_folder(job.format)) as temporary:
        write_shard(job.format, temporary, source.batches(shard, pace.made), shard.count, source.shape)
        digest = digest_of(temporary)
        commit(out, job, shard, temporary, digest, seconds=pace.seconds)
    return True


def commit(out: Path, job: Job, shard: Shard, temporary: Path, digest: str, *, seconds: float) -> None:
    """Give a finished shard its name and its marker, unless another worker did so meanwhile.

    Raises:
        CheckFailed: it did, with other bytes.
        EnvironmentProblem, ResourceProblem: it cannot be written.
    """
    with locked(out):
        other = read_marker(out, shard)
        if other is not None and intact(out, job, shard) is not None:
            if other.sha256 != digest:
                raise CheckFailed(
                    f"{shard.name} was made twice, with different bytes: here on {cpu_model() or 'this CPU'}, and on "
                    f"{other.cpu or 'another'} ({other.host}). Run a job on machines of one kind, or delete "
                    f"{shard.marker} to have the shard made again"
                )
            return
        size = size_of(temporary)
        publish(temporary, out / shard.name)
        marker = Marker(
            shard=shard.number,
            file=shard.name,
            first=shard.first,
            count=shard.count,
            bytes=size,
            sha256=digest,
            fingerprint=job.fingerprint,
            seconds=seconds,
            created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            host=platform.node(),
            cpu=cpu_model(),
        )
        write_marker(out, shard, marker)
