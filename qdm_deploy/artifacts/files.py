"""Files and folders that are either complete under their final name or not there at all.

Everything is written beside its final name, flushed to the disk and renamed. A process that is killed half-way leaves
at most a hidden ``.NAME.tmp-XXXXXXXX`` next to it, which nothing reads and which can be deleted; killed in the instant
in which one folder replaces another, it can leave the old one as ``.NAME.old-XXXXXXXX``. Writing needs POSIX.
"""

import errno
import hashlib
import json
import math
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from qdm_deploy.errors import EnvironmentProblem, InputError, QdmError, ResourceProblem

__all__ = [
    "StagedDirectory",
    "canonical_json",
    "disk_problems",
    "flush",
    "flush_tree",
    "new_directory",
    "new_file",
    "open_plain_file",
    "plain_json",
    "raise_if_full",
    "sha256_of",
    "sha256_of_stream",
    "special_file_problem",
]

CHUNK_BYTES = 1 << 20
# O_NONBLOCK: opening a pipe that took the file's place must not wait for a writer.
_READ_FLAGS = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)

_FULL = {errno.ENOSPC, errno.EDQUOT}
_NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS}
_BAD_NAME = {errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP}


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content as 64 lower-case hex digits, read in chunks of 1 MiB. Follows symbolic links.

    Raises:
        OSError: The file cannot be read.
    """
    with open(path, "rb", buffering=0) as stream:
        return sha256_of_stream(stream)


def sha256_of_stream(stream: BinaryIO) -> str:
    """SHA-256 of what is left in an unbuffered or buffered binary stream, as 64 lower-case hex digits."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(CHUNK_BYTES))
    while count := stream.readinto(buffer):  # type: ignore[attr-defined]  # typeshed's BinaryIO lacks readinto
        digest.update(buffer[:count])
    return digest.hexdigest()


def open_plain_file(path: Path) -> BinaryIO:
    """Open a regular file with one name for reading, without buffering.

    Links are refused because their content can change, or lie, outside the folder that was checked.

    Raises:
        OSError: It is a link, a pipe, a device or a folder, has a second hard link, or cannot be read; ``strerror``
            says which.
    """
    _refuse_special(path, os.lstat(path))  # before open: opening a device can have effects
    descriptor = os.open(path, _READ_FLAGS)
    try:
        _refuse_special(path, os.fstat(descriptor))
        return open(descriptor, "rb", buffering=0)
    except BaseException:
        os.close(descriptor)
        raise


def _refuse_special(path: Path, status: os.stat_result) -> None:
    problem = special_file_problem(status)
    if problem is not None:
        raise OSError(errno.EINVAL, problem, str(path))


def special_file_problem(status: os.stat_result) -> str | None:
    """What makes an ``lstat`` result something else than a regular file with one name, or None."""
    if stat.S_ISLNK(status.st_mode):
        return "is a symbolic link; a regular file is expected"
    if not stat.S_ISREG(status.st_mode):
        return "is a folder, a pipe or a device; a regular file is expected"
    if status.st_nlink != 1:
        return f"has {status.st_nlink} hard links; a file with one name is expected"
    return None


def canonical_json(value: object) -> bytes:
    """The one UTF-8 JSON text of a value: sorted keys, no spaces; equal values give equal bytes.

    Raises:
        ValueError: The value is not plain JSON (see ``plain_json``).
    """
    text = json.dumps(plain_json(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8")


def plain_json(value: object, *, where: str = "value") -> object:
    """A value as it comes back from JSON: dict, list, str, int, finite float, bool, None.

    Stricter than ``json.dumps``, which turns the key 1 into "1" and writes NaN.

    Args:
        value: Mappings with text keys, lists, tuples and the scalars above.
        where: Name of the value in messages.

    Raises:
        ValueError: Names the place of the first thing that JSON cannot hold.
    """
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"{where} is {value!a}, which is not valid Unicode text") from error
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where} is {value}; JSON holds finite numbers only: leave it out or write None")
        return value
    if isinstance(value, list | tuple):
        return [plain_json(item, where=f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"{where} has the key {key!r}; JSON keys are text: use str(key)")
            plain_json(key, where=f"a key of {where}")
        return {key: plain_json(item, where=f"{where}.{key}") for key, item in value.items()}
    raise ValueError(f"{where} is a {type(value).__name__}; allowed: text, int, float, bool, None, lists, mappings")


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A file that gets its name only when the block ends without an error; an older file of that name is replaced then.

    Args:
        path: The final name; missing parent folders are made.

    Yields:
        An empty file beside it, to be written.

    Raises:
        InputError: The name is a folder, a link or a device.
        EnvironmentProblem: The folder cannot be written.
        ResourceProblem: The disk is full.
    """
    final = Path(os.path.abspath(path))
    if os.path.lexists(final) and not stat.S_ISREG(os.lstat(final).st_mode):
        raise InputError(f"{final} is a folder, a link or a device; give the name of a regular file")
    temporary = _beside(final, "tmp")
    with disk_problems(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    try:
        yield temporary
        with disk_problems(final):
            flush(temporary)
            os.replace(temporary, final)
            flush(final.parent)
    except BaseException as error:
        _remove(temporary, error)
        raise_if_full(final, error)
        raise


@contextmanager
def new_directory(
    path: Path, *, force: bool = False, may_replace: Callable[[Path], str | None] | None = None
) -> Iterator[Path]:
    """A folder that gets its name only when the block ends without an error.

    Args:
        path: The final name; missing parent folders are made.
        force: Replace an existing folder, if ``may_replace`` allows it. It is removed after the new one took its place.
        may_replace: Says why an existing folder must stay, or None; the default lets only an empty folder go.

    Yields:
        An empty folder beside it, to be filled.

    Raises:
        InputError: Something is there already that must stay.
        EnvironmentProblem: The parent folder cannot be written.
        ResourceProblem: The disk is full.
    """
    stage = StagedDirectory(path, force=force, may_replace=may_replace)
    try:
        yield stage.root
        stage.commit()
    except BaseException as error:
        stage.discard(error)
        raise_if_full(stage.final, error)
        raise


def _only_empty(path: Path) -> str | None:
    return "is not empty" if any(path.iterdir()) else None


class StagedDirectory:
    """A folder under a temporary name: ``commit`` gives it its final name, ``discard`` removes it.

    Arguments and errors are those of ``new_directory``.
    """

    def __init__(
        self, path: Path, *, force: bool = False, may_replace: Callable[[Path], str | None] | None = None
    ) -> None:
        self.final = Path(os.path.abspath(path))
        self._force = force
        self._may_replace = may_replace or _only_empty
        self._refuse_existing()
        self.root = _beside(self.final, "tmp")
        with disk_problems(self.final):
            self.final.parent.mkdir(parents=True, exist_ok=True)
            os.mkdir(self.root)

    def _refuse_existing(self) -> None:
        if not os.path.lexists(self.final):
            return
        if not stat.S_ISDIR(os.lstat(self.final).st_mode):
            raise InputError(f"{self.final} exists and is not a folder: remove it, or choose another name")
        if not self._force:
            raise InputError(f"{self.final} exists: choose another name, or replace it with --force (force=True)")
        with disk_problems(self.final):
            reason = self._may_replace(self.final)
        if reason is not None:
            raise InputError(
                f"{self.final} {reason}, so it is not replaced: remove it yourself, or choose another name"
            )

    def commit(self) -> None:
        """Flush every file to the disk and take the final name."""
        old: Path | None = None
        with disk_problems(self.final):
            flush_tree(self.root)
            self._refuse_existing()  # again: hours may have passed
            if os.path.lexists(self.final):
                old = _beside(self.final, "old")
                os.rename(self.final, old)
            try:
                os.rename(self.root, self.final)
            except BaseException:
                if old is not None and not os.path.lexists(self.final):
                    os.rename(old, self.final)
                raise
            flush(self.final.parent)
        if old is not None:
            try:
                shutil.rmtree(old)
            except OSError as error:
                raise EnvironmentProblem(
                    f"{self.final} is complete, but what it replaced is still at {old} and cannot be removed"
                    f" ({error.strerror}): delete it yourself"
                ) from error

    def discard(self, error: BaseException | None = None) -> None:
        """Remove what was written; nothing happens after a commit. A failure to remove becomes a note on ``error``."""
        _remove(self.root, error)


def raise_if_full(path: Path, error: BaseException) -> None:
    """Raise ``ResourceProblem`` in place of an ``OSError`` that says the disk, or the user's quota, is full."""
    if isinstance(error, OSError) and error.errno in _FULL:
        raise _problem(path, error) from error


@contextmanager
def disk_problems(path: Path) -> Iterator[None]:
    """Say what an ``OSError`` in the block means to who asked for ``path``.

    Raises:
        ResourceProblem: The disk, or the user's quota, is full.
        EnvironmentProblem: The place may not be written.
        InputError: The name cannot be made.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL | _NOT_WRITABLE | _BAD_NAME:
            raise
        raise _problem(path, error) from error


def _problem(path: Path, error: OSError) -> QdmError:
    cause = f"{error.strerror}: {error.filename}" if error.filename else str(error.strerror)
    if error.errno in _FULL:
        folder = next(parent for parent in path.parents if parent.exists())
        free = shutil.disk_usage(folder).free / (1 << 20)
        return ResourceProblem(
            f"{path} cannot be written ({cause}): {free:.1f} MiB are free in {folder}; free some space, or choose"
            " another folder"
        )
    if error.errno in _NOT_WRITABLE:
        return EnvironmentProblem(f"{path} cannot be written ({cause}): choose a folder that you may write to")
    return InputError(f"{path} cannot be made ({cause}): choose another name")


def _beside(final: Path, purpose: str) -> Path:
    # The name is cut so that the longest allowed one still has a temporary twin, also in four-byte letters.
    return final.with_name(f".{final.name[:50]}.{purpose}-{secrets.token_hex(4)}")


def _remove(path: Path, error: BaseException | None) -> None:
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as failure:
        if error is None:
            raise
        error.add_note(f"{path} could not be removed ({failure.strerror}); it can be deleted")


def flush_tree(root: Path) -> None:
    """Write a folder, with all that is in it, through to the disk."""

    def refuse(error: OSError) -> None:
        raise error

    for folder, _, names in os.walk(root, topdown=False, onerror=refuse):
        for name in names:
            path = Path(folder, name)
            if stat.S_ISREG(os.lstat(path).st_mode):
                flush(path)
        flush(Path(folder))


def flush(path: Path) -> None:
    """Write a file, or a folder's list of names, through to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
