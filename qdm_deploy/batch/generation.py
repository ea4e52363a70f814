"""Batch generation as a whole: find the place, run its workers, say what there is now."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from qdm_deploy.batch.job import JOB_NAME
from qdm_deploy.batch.options import BatchOptions
from qdm_deploy.batch.place import Place, find_place
from qdm_deploy.batch.run import PlaceResult, run_place
from qdm_deploy.batch.status import BatchStatus, batch_status
from qdm_deploy.batch.workers import run_workers
from qdm_deploy.errors import InputError
from qdm_deploy.progress import SILENT, Progress

__all__ = ["BatchResult", "generate_batch"]


@dataclass(frozen=True)
class BatchResult:
    """What one call did, and how far the whole job is.

    Attributes:
        out: the job's folder.
        place: which part of the shards was asked of this call.
        shards, images: what it made.
        there: shards of its part that were complete before.
        seconds: wall time, without the start of the sessions where several workers ran.
        images_per_second: of this call; None when it made nothing.
        engine: ``StepSession.describe`` of a worker.
        status: how far the whole job is.
    """

    out: Path
    place: Place
    shards: int
    images: int
    there: int
    seconds: float
    images_per_second: float | None
    engine: dict[str, object]
    status: BatchStatus


def generate_batch(options: BatchOptions, progress: Progress = SILENT) -> BatchResult:
    """Make the missing shards of this machine's part of a job.

    Raises:
        TryAgain: SIGTERM or SIGUSR1 came; the same call goes on.
        QdmError: see ``qdm_deploy.errors``; whatever is raised, committed shards stay.
    """
    place = find_place(options.rank, options.world, os.environ)
    if place.world > 1:
        progress.say(f"part {place.rank} of {place.world}, from {place.source}")
    start = time.perf_counter()
    joining = (options.out / JOB_NAME).exists()
    try:
        results = _run(options, place, progress)
    except InputError:
        # Another machine may have begun the job meanwhile, with threads that this one is to take over.
        if joining or options.threads is not None or not (options.out / JOB_NAME).exists():
            raise
        results = _run(options, place, progress)
    except KeyboardInterrupt as error:
        again = "stopped; complete shards stay: run the same command again to go on"
        raise error if error.args else type(error)(again) from None
    images = sum(result.images for result in results)
    seconds = results[0].seconds if options.workers == 1 else time.perf_counter() - start
    return BatchResult(
        out=options.out,
        place=place,
        shards=sum(result.made for result in results),
        images=images,
        there=sum(result.there for result in results),
        seconds=seconds,
        images_per_second=images / seconds if images else None,
        engine=results[0].engine,
        status=batch_status(options.out),
    )


def _run(options: BatchOptions, place: Place, progress: Progress) -> list[PlaceResult]:
    return [run_place(options, place, progress)] if options.workers == 1 else run_workers(options, place, progress)
