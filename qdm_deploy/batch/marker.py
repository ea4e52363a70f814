"""The marker of a shard: a small JSON file that is written last, so that its shard is whole where it exists."""

import hashlib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from qdm_deploy.artifacts.files import canonical_json, disk_problems, sha256_of
from qdm_deploy.batch.job import Job, Shard
from qdm_deploy.batch.staging import publish, staged

__all__ = ["Marker", "digest_of", "forget", "intact", "read_marker", "size_of", "write_marker"]


class Marker(BaseModel):
    """What a shard holds, and how it came to be.

    Attributes:
        shard: number of the shard.
        file: name of the file or folder.
        first, count: it holds the pictures ``first`` .. ``first + count - 1``.
        bytes: size; of a folder, that of its files.
        sha256: ``digest_of``.
        fingerprint: of the job.
        seconds: from the first step to the finished file.
        created: UTC time of the commit.
        host, cpu: where it was made; these may differ between runs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: str = "1.0"
    shard: int
    file: str
    first: int
    count: int
    bytes: int
    sha256: str
    fingerprint: str
    seconds: float
    created: str
    host: str
    cpu: str


def digest_of(payload: Path) -> str:
    """SHA-256 of a file; of a folder, that of the names and digests of its files. 64 hex digits."""
    if payload.is_dir():
        listing = {path.name: sha256_of(path) for path in payload.iterdir()}
        return hashlib.sha256(canonical_json(listing)).hexdigest()
    return sha256_of(payload)


def size_of(payload: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    return sum(path.stat().st_size for path in (payload.iterdir() if payload.is_dir() else (payload,)))


def read_marker(out: Path, shard: Shard) -> Marker | None:
    """The marker of a shard; None where there is none that can be read."""
    try:
        return Marker.model_validate_json((out / shard.marker).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def intact(out: Path, job: Job, shard: Shard) -> Marker | None:
    """The marker of a shard that is whole as far as its size tells; None when it must be made."""
    marker = read_marker(out, shard)
    if (
        marker is None
        or marker.fingerprint != job.fingerprint
        or (marker.first, marker.count)
        != (
            shard.first,
            shard.count,
        )
    ):
        return None
    try:
        return marker if size_of(out / shard.name) == marker.bytes else None
    except OSError:
        return None


def write_marker(out: Path, shard: Shard, marker: Marker) -> None:
    """Say that a shard is whole.

    Raises:
        EnvironmentProblem, ResourceProblem: it cannot be written.
    """
    with staged(out / shard.marker) as temporary:
        temporary.write_bytes(marker.model_dump_json(indent=2).encode() + b"\n")
        publish(temporary, out / shard.marker)


def forget(out: Path, shard: Shard) -> None:
    """Remove the marker of a shard, so that the next run makes the shard again."""
    with disk_problems(out / shard.marker):
        (out / shard.marker).unlink(missing_ok=True)
