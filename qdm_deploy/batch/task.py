"""What the parent of several workers hands to each of them."""

from dataclasses import dataclass

from pydantic import TypeAdapter

from qdm_deploy.batch.options import BatchOptions
from qdm_deploy.batch.place import Place

__all__ = ["TASK", "Task"]


@dataclass(frozen=True)
class Task:
    """The job's options, with the threads of one worker, and which part of the shards it makes."""

    options: BatchOptions
    place: Place


TASK = TypeAdapter(Task)
