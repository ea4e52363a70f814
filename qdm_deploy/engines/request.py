"""What a build is asked for. The values cross a process boundary as JSON and enter the cache key."""

from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from qdm_deploy.errors import InputError

__all__ = ["BatchProfile", "BuildOptions", "BuildRequest"]


@dataclass(frozen=True)
class BatchProfile:
    """The batch sizes an engine serves: any from ``min`` to ``max``, fastest at ``opt``.

    Raises:
        InputError: Not 1 <= min <= opt <= max.
    """

    min: int = 1
    opt: int = 4
    max: int = 16

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise InputError(
                f"the batch profile {self} is not usable: it must satisfy 1 <= min <= opt <= max, for example 1:4:16"
            )

    def __str__(self) -> str:
        return f"{self.min}:{self.opt}:{self.max}"


@dataclass(frozen=True)
class BuildOptions:
    """How hard the builder works.

    Attributes:
        optimization_level: The builder optimization level, 0 (fast build) to 5 (fastest engine).
        workspace_bytes: Upper limit of the scratch memory a kernel may ask for; None leaves the library's default.
        auxiliary_streams: How many streams besides its own the engine may use; 0 runs every kernel after the one
            before it; None leaves the library's default.

    Raises:
        InputError: A value outside its range.
    """

    optimization_level: int = 3
    workspace_bytes: int | None = None
    auxiliary_streams: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.optimization_level <= 5:
            raise InputError(f"the builder optimization level is 0 to 5, not {self.optimization_level}")
        if self.workspace_bytes is not None and self.workspace_bytes < 1:
            raise InputError(f"the workspace limit is a positive number of bytes, not {self.workspace_bytes}")
        if self.auxiliary_streams is not None and self.auxiliary_streams < 0:
            raise InputError(f"the number of auxiliary streams is 0 or more, not {self.auxiliary_streams}")


class BuildRequest(BaseModel):
    """One build: everything the child process needs.

    ``plan``, ``log`` and ``layers`` are files it writes: the engine, the builder's log, and (where the library inspects
    its plan) the inspector's JSON. ``timing_cache`` is read and rewritten where the library has one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    backend: str
    graph: Path
    plan: Path
    log: Path
    layers: Path
    sm: str | None
    profile: BatchProfile
    options: BuildOptions
    timing_cache: Path | None = None
