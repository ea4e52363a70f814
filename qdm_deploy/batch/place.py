"""Which part of the shards this process makes: from the options, or from the variables that a launcher sets.

A job is cut into shards, and a place takes those whose number modulo ``world`` is ``rank``. The size of a shard, not
the number of places, is part of the job, so the number of places may change from one run to the next.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from qdm_deploy.errors import InputError

__all__ = ["Place", "find_place"]

_EXPLICIT = "give --rank and --world to say it yourself"


@dataclass(frozen=True)
class Place:
    """Rank ``rank`` of ``world`` equal parts; ``source`` says where that comes from."""

    rank: int = 0
    world: int = 1
    source: str = "one machine"

    def split(self, worker: int, workers: int) -> "Place":
        """The part of one of several workers at this place."""
        return Place(self.rank * workers + worker, self.world * workers, f"worker {worker} of {workers}, {self.source}")


def find_place(rank: int | None, world: int | None, environment: Mapping[str, str]) -> Place:
    """The place that was asked for, or else the one that a launcher gave this process.

    Recognised are SLURM array jobs (``SLURM_ARRAY_TASK_ID``, ``_COUNT``, ``_MIN``, ``_STEP``), torchrun (``RANK``,
    ``WORLD_SIZE``) and Kubernetes Indexed Jobs (``JOB_COMPLETION_INDEX``; ``JOB_COMPLETIONS`` must be set in the pod
    to the job's ``completions``, which Kubernetes does not tell its pods).

    Raises:
        InputError: the variables contradict themselves or each other, or half of them is missing.
    """
    if rank is not None and world is not None:
        return Place(rank, world, "--rank and --world")
    found = [place for look in (_slurm, _torchrun, _kubernetes) if (place := look(environment)) is not None]
    if len(found) > 1:
        raise InputError(
            f"two launchers say which part this is: {' and '.join(place.source for place in found)}; {_EXPLICIT}"
        )
    return found[0] if found else Place()


def _slurm(environment: Mapping[str, str]) -> Place | None:
    if "SLURM_ARRAY_TASK_ID" not in environment:
        return None
    task, count = (_number(environment, name) for name in ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"))
    first = _number(environment, "SLURM_ARRAY_TASK_MIN") if "SLURM_ARRAY_TASK_MIN" in environment else 0
    step = _number(environment, "SLURM_ARRAY_TASK_STEP") if "SLURM_ARRAY_TASK_STEP" in environment else 1
    rank, odd = divmod(task - first, max(step, 1))
    if odd or not 0 <= rank < count:
        # An array such as 3,7 has ids that say nothing about their order.
        raise InputError(
            f"SLURM array task {task} (first {first}, step {step}) has no place among {count} tasks: the array must be "
            f"a plain range, such as --array=0-{count - 1}; {_EXPLICIT}"
        )
    return Place(rank, count, "SLURM_ARRAY_TASK_ID")


def _torchrun(environment: Mapping[str, str]) -> Place | None:
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return None
    return _checked(_number(environment, "RANK"), _number(environment, "WORLD_SIZE"), "RANK", "WORLD_SIZE")


def _kubernetes(environment: Mapping[str, str]) -> Place | None:
    if "JOB_COMPLETION_INDEX" not in environment:
        return None
    if "JOB_COMPLETIONS" not in environment:
        raise InputError(
            "JOB_COMPLETION_INDEX is set and JOB_COMPLETIONS is not: set it in the pod's env to the job's "
            f"spec.completions, or {_EXPLICIT}"
        )
    index, completions = _number(environment, "JOB_COMPLETION_INDEX"), _number(environment, "JOB_COMPLETIONS")
    return _checked(index, completions, "JOB_COMPLETION_INDEX", "JOB_COMPLETIONS")


def _checked(rank: int, world: int, rank_name: str, world_name: str) -> Place:
    if not 0 <= rank < world:
        raise InputError(f"{rank_name} is {rank} and {world_name} is {world}; ranks are 0 to {world - 1}; {_EXPLICIT}")
    return Place(rank, world, rank_name)


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    if not text.isdecimal():
        raise InputError(f"the variable {name} is {text!r}; it should be a number: {_EXPLICIT}")
    return int(text)
