"""How far a job is, and whether what it made is what it should be."""

from dataclasses import dataclass
from pathlib import Path

from qdm_deploy.batch.formats import read_indices
from qdm_deploy.batch.job import JOB_NAME, Job, Shard, read_job
from qdm_deploy.batch.marker import Marker, digest_of, forget, intact, read_marker
from qdm_deploy.batch.staging import LOCK_NAME, clock_of, is_alive, leftovers, locked
from qdm_deploy.errors import EnvironmentProblem
from qdm_deploy.progress import SILENT, Progress

__all__ = ["BatchStatus", "BatchVerification", "batch_status", "verify_batch"]


@dataclass(frozen=True)
class BatchStatus:
    """How far a job is.

    Attributes:
        job: what is made.
        shards, images: what is complete.
        bytes: its size.
        missing: numbers of the shards that are not complete.
        running: shards that somebody seems to write now.
        left_over: temporary files whose writer is gone; the next run removes them.
        images_per_second: of one worker, over all complete shards; None before the first.
        seconds_left: with as many workers as are running now; None while none is, or nobody knows their speed.
        cpus: kinds of CPU that made the shards; bytes may depend on it.
    """

    job: Job
    shards: int
    images: int
    bytes: int
    missing: tuple[int, ...]
    running: int
    left_over: int
    images_per_second: float | None
    seconds_left: float | None
    cpus: tuple[str, ...]


def batch_status(out: Path) -> BatchStatus:
    """Look at a job's folder; sizes are compared, hashes are not.

    Raises:
        InputError: it is not a job's folder.
    """
    job = read_job(out)
    found = {number: intact(out, job, job.shard(number)) for number in range(job.shards)}
    whole: list[Marker] = [marker for marker in found.values() if marker is not None]
    images, seconds = sum(marker.count for marker in whole), sum(marker.seconds for marker in whole)
    rate = images / seconds if seconds > 0 else None
    temporary = leftovers(out)
    now = _now(out)
    running = sum(is_alive(path, now) for path in temporary)
    return BatchStatus(
        job=job,
        shards=len(whole),
        images=images,
        bytes=sum(marker.bytes for marker in whole),
        missing=tuple(number for number, marker in found.items() if marker is None),
        running=running,
        left_over=len(temporary) - running,
        images_per_second=rate,
        seconds_left=(job.count - images) / (rate * running) if rate and running else None,
        cpus=tuple(sorted({marker.cpu for marker in whole})),
    )


def _now(out: Path) -> float:
    # A folder that may only be read has its own last change for a clock.
    try:
        return clock_of(out)
    except EnvironmentProblem:
        return out.stat().st_mtime


@dataclass(frozen=True)
class BatchVerification:
    """What is wrong with a job's output.

    Attributes:
        findings: one sentence each; empty when every picture is there once and as it was made.
        bad: numbers of the shards that must be made again, those that were never made among them.
        discarded: whether their markers were removed.
        images: pictures that are good.
    """

    findings: tuple[str, ...]
    bad: tuple[int, ...]
    discarded: bool
    images: int

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.findings


def verify_batch(out: Path, *, discard: bool = False, progress: Progress = SILENT) -> BatchVerification:
    """Read every shard: its hash, the numbers of its pictures; no gap, no duplicate, nothing else in the folder.

    Args:
        out: the job's folder.
        discard: remove the marker of every shard that is not good, so that the next run makes it again.
        progress: where to report.

    Raises:
        InputError: it is not a job's folder.
        EnvironmentProblem: a marker cannot be removed.
    """
    job = read_job(out)
    shards = [job.shard(number) for number in range(job.shards)]
    findings: list[str] = []
    bad: list[Shard] = []
    with progress.task("Verifying", len(shards)) as advance:
        for shard in shards:
            problem = _problem(out, job, shard)
            if problem is not None:
                findings.append(problem)
                bad.append(shard)
            advance()
    if discard:
        with locked(out):
            for shard in bad:
                forget(out, shard)
    known = {JOB_NAME, LOCK_NAME, *(name for shard in shards for name in (shard.name, shard.marker))}
    strangers = {path.name for path in out.iterdir()} - known - {path.name for path in leftovers(out)}
    findings += [f"{name} is not part of the job" for name in sorted(strangers)]
    images = job.count - sum(shard.count for shard in bad)
    return BatchVerification(tuple(findings), tuple(shard.number for shard in bad), discard and bool(bad), images)


def _problem(out: Path, job: Job, shard: Shard) -> str | None:
    marker = read_marker(out, shard)
    if marker is None:
        last = shard.first + shard.count - 1
        return f"{shard.name} is missing: pictures {shard.first} to {last} are not there"
    if marker.fingerprint != job.fingerprint:
        return f"{shard.marker} belongs to another job ({marker.fingerprint[:12]} instead of {job.fingerprint[:12]})"
    wanted = list(range(shard.first, shard.first + shard.count))
    if (marker.shard, marker.first, marker.count, marker.file) != (shard.number, shard.first, shard.count, shard.name):
        return f"{shard.marker} is of other pictures: {marker.first} to {marker.first + marker.count - 1}"
    try:
        digest = digest_of(out / shard.name)
        if digest != marker.sha256:
            return f"{shard.name} has SHA-256 {digest}, and {marker.sha256} is expected"
        if (indices := read_indices(job.format, out / shard.name)) != wanted:
            return f"{shard.name} holds {len(indices)} pictures, {_first_difference(indices, wanted)}"
    except (OSError, ValueError) as error:
        return f"{shard.name} cannot be read ({error})"
    return None


def _first_difference(found: list[int], wanted: list[int]) -> str:
    pairs = enumerate(zip(found, wanted, strict=False))
    place = next((at for at, (one, other) in pairs if one != other), min(len(found), len(wanted)))
    there = found[place] if place < len(found) else "nothing"
    return f"and {there} where {wanted[place] if place < len(wanted) else 'the end'} is expected"
