"""A job: everything that decides the bytes of its shards, as one document with a fingerprint.

Picture i is made from seed ``seed + i`` with the label or the text state whose turn it is, in the batch of its shard
that holds it. Batches always have ``batch_size`` rows: the last one of a shard is filled with pictures that are thrown
away, so neither workers nor their number change a byte.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from qdm_deploy.artifacts.bundle import Bundle
from qdm_deploy.artifacts.files import canonical_json, sha256_of
from qdm_deploy.artifacts.record import installed_version
from qdm_deploy.batch.options import BatchOptions, Format
from qdm_deploy.batch.staging import publish, staged
from qdm_deploy.components.encoders import Encoder
from qdm_deploy.components.sampling import run_settings
from qdm_deploy.errors import InputError
from qdm_deploy.runtime.cpu import available_cores

__all__ = ["JOB_NAME", "Job", "Shard", "job_of", "join_job", "read_job", "threads_for"]

JOB_NAME = "job.json"
_SUFFIX: dict[Format, str] = {"webdataset": ".tar", "npz": ".npz", "png": ""}


@dataclass(frozen=True)
class Shard:
    """Pictures ``first`` .. ``first + count - 1``; ``name`` is its file or folder, ``marker`` says that it is whole."""

    number: int
    first: int
    count: int
    name: str
    marker: str


class Job(BaseModel):
    """What decides the bytes.

    ``engine`` is what the session says of itself. The number of its threads counts: OpenVINO adds up in another order
    with another number of them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: str = "1.0"
    bundle_id: str
    model: str
    count: int
    shard_size: int
    format: Format
    seed: int
    sampler: str
    steps: int
    eta: float
    guidance: float
    guidance_rescale: float = 0.0
    label: str | None
    conditioning_sha256: str | None
    precision: str
    batch_size: int
    engine: dict[str, JsonValue]
    versions: dict[str, str]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the document: 64 hex digits."""
        return hashlib.sha256(canonical_json(self.model_dump(mode="json"))).hexdigest()

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.count // self.shard_size)

    def shard(self, number: int) -> Shard:
        """Shard ``number``, from 0."""
        first = number * self.shard_size
        stem = f"shard-{number:0{max(5, len(str(self.shards - 1)))}d}"
        count = min(self.shard_size, self.count - first)
        return Shard(number, first, count, stem + _SUFFIX[self.format], f"{stem}.json")

    def changes(self, other: "Job") -> list[str]:
        """What differs in another job: one phrase a field, "steps: 50 there, 20 here" with ``other`` as here."""
        mine, theirs = _flat(self.model_dump(mode="json")), _flat(other.model_dump(mode="json"))
        return [
            f"{name}: {mine.get(name, 'nothing')} there, {theirs.get(name, 'nothing')} here"
            for name in dict.fromkeys((*mine, *theirs))
            if mine.get(name) != theirs.get(name)
        ]


def _flat(document: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in document.items():
        flat.update(_flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value})
    return flat


def job_of(options: BatchOptions, bundle: Bundle, engine: Mapping[str, object], encoder: Encoder) -> Job:
    """The job that the options ask for.

    Args:
        options: what is asked for.
        bundle: the opened bundle.
        engine: ``StepSession.describe()`` of the session that will run it.
        encoder: makes the conditions.

    Raises:
        InputError: the model has no such label, or no classes.
    """
    versions = {"qdm-deploy": installed_version() or "unknown", "numpy": np.__version__, "pillow": PIL.__version__}
    conditioning = options.conditioning_file
    run = run_settings(options, bundle.pipeline, bundle.scheduler_config())
    encoder.encode([options.label])  # refuses what the model does not know
    return Job(
        bundle_id=bundle.id,
        model=bundle.pipeline.name,
        count=options.count,
        shard_size=options.shard_size,
        format=options.format,
        seed=options.seed,
        sampler=run.sampler,
        steps=run.steps,
        eta=options.eta,
        guidance=run.guidance,
        guidance_rescale=options.guidance_rescale,
        label=None if options.label is None else encoder.captions([options.label])[0],
        conditioning_sha256=None if conditioning is None else sha256_of(conditioning),
        precision=options.precision,
        batch_size=options.batch_size,
        engine=_facts(engine),
        versions=versions,
    )


def _facts(engine: Mapping[str, object]) -> dict[str, Any]:
    return {
        name: _facts(value) if isinstance(value, Mapping) else value
        for name, value in engine.items()
        if name != "precision_reason"
    }


def threads_for(options: BatchOptions, workers: int) -> int:
    """Threads of a worker: as asked for, or those of the job that is under way, or a share of the cores."""
    if options.threads is not None:
        return options.threads
    if (options.out / JOB_NAME).exists():
        threads = read_job(options.out).engine.get("threads")
        if isinstance(threads, int):
            return threads
    return max(1, available_cores() // workers)


def read_job(out: Path) -> Job:
    """The job of a folder.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    path = out / JOB_NAME
    try:
        return Job.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{out} holds no {JOB_NAME}: it is not the folder of `qdm-deploy batch`") from None
    except (OSError, ValidationError) as error:
        raise InputError(f"{path} cannot be read ({error}): it was changed, or written by another version") from error


def join_job(out: Path, job: Job) -> None:
    """Write the job into its folder, or find the same one there.

    Raises:
        InputError: the folder belongs to another job, with every difference, or holds files that are of no job.
        EnvironmentProblem, ResourceProblem: the folder cannot be written.
    """
    if not (out / JOB_NAME).exists():
        # Hidden files are what a run leaves that was killed before it came this far.
        stray = sorted(path.name for path in out.iterdir() if not path.name.startswith(".")) if out.is_dir() else []
        if stray and JOB_NAME not in stray:
            raise InputError(f"{out} holds {stray[0]} and no {JOB_NAME}; choose a new or an empty folder")
        with staged(out / JOB_NAME) as temporary:
            temporary.write_bytes(job.model_dump_json(indent=2).encode() + b"\n")
            publish(temporary, out / JOB_NAME, keep=True)
    there = read_job(out)
    if there.fingerprint != job.fingerprint:
        raise InputError(
            f"{out} belongs to another job ({'; '.join(there.changes(job))}). Repeat its options to go on with it, or "
            "choose another folder"
        )
