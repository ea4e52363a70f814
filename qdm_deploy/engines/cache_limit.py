"""How much of the disk the engine cache may take, and which engines go first when it takes more."""

import os
import re
from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

from qdm_deploy.errors import InputError

__all__ = ["DEFAULT_LIMIT", "LIMIT_VARIABLE", "Sized", "bytes_of", "cache_limit", "over_limit"]

LIMIT_VARIABLE = "QDM_ENGINE_CACHE_LIMIT"
DEFAULT_LIMIT = 20 * 1000**3

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kMGT]?)(i?)B?", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


class Sized(Protocol):
    """What takes space: its bytes on disk and the time of its last use, in seconds since the epoch."""

    @property
    def disk_bytes(self) -> int:
        """Bytes on disk."""
        ...

    @property
    def last_used(self) -> float:
        """Seconds since the epoch."""
        ...


_Entry = TypeVar("_Entry", bound=Sized)


def bytes_of(text: str) -> int:
    """A size as people write it, in bytes: ``500M``, ``20 GB``, ``1.5GiB``, ``0``.

    Raises:
        InputError: It is not a size.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise InputError(f"{text!r} is not a size; write a number with a unit, for example 500M, 20G or 1.5GiB")
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** _POWERS[match[2].lower()])


def cache_limit() -> int:
    """The size the cache may have, in bytes: ``$QDM_ENGINE_CACHE_LIMIT``, or ``DEFAULT_LIMIT``.

    Raises:
        InputError: The variable holds no size.
    """
    text = os.environ.get(LIMIT_VARIABLE)
    if not text:
        return DEFAULT_LIMIT
    try:
        return bytes_of(text)
    except InputError as error:
        raise InputError(f"the environment variable {LIMIT_VARIABLE} cannot be read: {error}") from error


def over_limit(entries: Iterable[_Entry], max_bytes: int) -> Sequence[_Entry]:
    """The entries to remove, least recently used first, so that the others take ``max_bytes`` or less."""
    ordered = sorted(entries, key=lambda entry: entry.last_used)
    total = sum(entry.disk_bytes for entry in ordered)
    gone = []
    for entry in ordered:
        if total <= max_bytes:
            break
        gone.append(entry)
        total -= entry.disk_bytes
    return gone
