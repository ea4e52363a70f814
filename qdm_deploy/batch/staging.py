"""Files and folders under a temporary name that says who writes them, and what is to become of them.

A name is ``.FINAL.tmp-HOST-NAMESPACE-PID-RANDOM``. A process that is killed leaves it behind; the next run removes it
when its writer is surely gone: the process is dead on this host (and in this process namespace: containers may share
a host's name), or nothing was written for hours. Removing too little costs disk space and removing too much a shard
that is made again; what is committed is never touched.
"""

import contextlib
import errno
import fcntl
import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qdm_deploy.artifacts.files import disk_problems, flush, flush_tree, raise_if_full

__all__ = ["LOCK_NAME", "is_alive", "leftovers", "locked", "publish", "staged", "sweep"]

LOCK_NAME = ".lock"
_SILENT_HOURS = 6
_TEMPORARY = re.compile(r"\..+\.tmp-(?P<owner>.+)-(?P<pid>\d+)-[0-9a-f]{8}")
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_NO_LOCKS = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL}

_open: set[str] = set()


def _owner() -> str:
    host = re.sub(r"[^A-Za-z0-9.-]", "", platform.node())[:60] or "host"
    namespace = Path("/proc/self/ns/pid")
    return f"{host}-{namespace.stat().st_ino if namespace.exists() else 0}"


@contextmanager
def staged(final: Path, *, folder: bool = False) -> Iterator[Path]:
    """An empty file or folder beside ``final``, removed at the end of the block unless ``publish`` renamed it.

    Raises:
        EnvironmentProblem: the place cannot be written.
        ResourceProblem: the disk is full, here or in the block.
    """
    name = f".{final.name}.tmp-{_owner()}-{os.getpid()}-{secrets.token_hex(4)}"
    temporary = final.with_name(name)
    _open.add(name)
    try:
        with disk_problems(final):
            final.parent.mkdir(parents=True, exist_ok=True)
            if folder:
                temporary.mkdir()
            else:
                os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        yield temporary
    except OSError as error:
        raise_if_full(final, error)
        raise
    finally:
        with contextlib.suppress(OSError):
            _remove(temporary)
        _open.discard(name)


def publish(temporary: Path, final: Path, *, keep: bool = False) -> None:
    """Flush to the disk and take the final name, in place of what has it; ``keep``: unless a file has it already.

    Raises:
        EnvironmentProblem, ResourceProblem: it cannot be written.
    """
    with disk_problems(final):
        if temporary.is_dir():
            flush_tree(temporary)
            if final.is_dir():
                with staged(final, folder=True) as old:
                    os.replace(final, old)
                    os.replace(temporary, final)
            else:
                os.rename(temporary, final)
        else:
            flush(temporary)
            if not keep or not _linked(temporary, final):
                os.replace(temporary, final)
        flush(final.parent)


def _linked(temporary: Path, final: Path) -> bool:
    """Take a name that nobody has; False where the file system has no hard links."""
    try:
        os.link(temporary, final)
    except FileExistsError:
        return True
    except OSError as error:
        if error.errno in _NO_LINKS:
            return False
        raise
    return True


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Alone in the folder, among all processes that ask; on a file system without locks nobody waits."""
    with disk_problems(out / LOCK_NAME):
        descriptor = os.open(out / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield
    finally:
        os.close(descriptor)


def leftovers(out: Path) -> list[Path]:
    """Everything under a temporary name, whether somebody still writes it or not."""
    return sorted(path for path in out.iterdir() if _TEMPORARY.fullmatch(path.name))


def is_alive(path: Path, now: float) -> bool:
    """Whether somebody may still write a temporary file.

    Args:
        path: as ``leftovers`` lists it.
        now: seconds since the epoch by the clock of the file system.
    """
    match = _TEMPORARY.fullmatch(path.name)
    if match is None or path.name in _open:
        return True
    try:
        written = path.stat().st_mtime
    except FileNotFoundError:
        return False
    pid = int(match["pid"])
    # A number may come back, even as ours: containers start counting at 1 again.
    if match["owner"] == _owner() and (pid == os.getpid() or not _runs(pid)):
        return False
    return now - written < _SILENT_HOURS * 3600


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def sweep(out: Path) -> list[Path]:
    """Remove what killed processes left, and return it."""
    now = clock_of(out)
    dead = [path for path in leftovers(out) if not is_alive(path, now)]
    for path in dead:
        with contextlib.suppress(OSError):  # another worker sweeps too, or it belongs to another user
            _remove(path)
    return [path for path in dead if not path.exists()]


def clock_of(out: Path) -> float:
    """Now, by the clock that stamps the folder's files: a file server's need not be ours."""
    with disk_problems(out / LOCK_NAME):
        descriptor = os.open(out / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            os.utime(descriptor)
            return os.fstat(descriptor).st_mtime
        finally:
            os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
