"""What a user can ask of batch generation; refused here, before any work starts, when it cannot be done."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qdm_deploy.choices import one_of, within
from qdm_deploy.components.sampling import SamplingOptions
from qdm_deploy.errors import InputError

__all__ = ["FORMATS", "BatchOptions", "Format"]

Format = Literal["webdataset", "npz", "png"]
FORMATS: tuple[Format, ...] = ("webdataset", "npz", "png")

_MAX_SEED = 2**63 - 1
_MAX_IMAGES = 1_000_000_000
_MAX_SHARD = 1_000_000
_MAX_BATCH = 1024
_MAX_WORKERS = 256
_MAX_GRACE = 24 * 3600


@dataclass(frozen=True)
class BatchOptions(SamplingOptions):
    """From a bundle to very many pictures, in shards.

    Attributes:
        bundle: the bundle's folder.
        out: folder of the shards; it is made, or holds an unfinished run of the same job.
        count: how many pictures the whole job makes, over all workers; picture i has seed ``seed`` + i.
        format: "webdataset" (tar files), "npz" (``arr_0`` uint8 [N, H, W, 3]) or "png" (folders of files).
        shard_size: pictures of one shard; the last may hold fewer.
        workers: processes on this machine, which share its cores.
        rank, world: this machine's part of the shards: those whose number modulo ``world`` is ``rank``; None: the
            variables of a launcher say it (``qdm_deploy.batch.place``), or there is one part.
        seed: of the first picture.
        label: name or number of a class; None: all classes in turn.
        backend, precision: what runs it.
        threads: of one worker. They are part of the job too; None: those of the job that is under way in ``out``, or an
            equal share of the cores.
        batch_size: pictures that are denoised together. It is part of the job: INT8 kernels may round a row
            differently in a batch of another size.
        grace: seconds that a shard may still take to finish after SIGTERM or SIGUSR1; one that needs longer is dropped.
    """

    bundle: Path
    out: Path
    count: int
    format: Format = "webdataset"
    shard_size: int = 1000
    workers: int = 1
    rank: int | None = None
    world: int | None = None
    seed: int = 0
    label: str | None = None
    backend: str = "auto"
    precision: Literal["int8", "float"] = "int8"
    batch_size: int = 16
    threads: int | None = None
    grace: float = 20.0

    def __post_init__(self) -> None:
        """Refuse what cannot be made."""
        super().__post_init__()
        one_of("format", self.format, FORMATS)
        one_of("precision", self.precision, ("int8", "float"))
        within("the number of images", self.count, 1, _MAX_IMAGES)
        within("shard size", self.shard_size, 1, _MAX_SHARD)
        within("workers", self.workers, 1, _MAX_WORKERS)
        within("batch size", self.batch_size, 1, _MAX_BATCH)
        within("seed", self.seed, 0, _MAX_SEED - self.count - self.batch_size)
        within("grace", self.grace, 0, _MAX_GRACE)
        if (self.rank is None) != (self.world is None):
            raise InputError(
                f"rank is {self.rank} and world is {self.world}; give both, or neither to take a launcher's variables"
            )
        if self.world is not None and self.rank is not None:
            within("world", self.world, 1, _MAX_IMAGES)
            within("rank", self.rank, 0, self.world - 1)
        if self.threads is not None and self.threads < 1:
            raise InputError(f"{self.threads} threads cannot run anything; give at least 1, or leave it out")
