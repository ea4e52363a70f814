"""Where this machine keeps what it can make again: engines, samples of evaluations, measured choices."""

import os
import stat
from pathlib import Path

from qdm_deploy.errors import EnvironmentProblem

__all__ = ["cache_folder", "trust_problem"]


def cache_folder(kind: str) -> Path:
    """``$QDM_CACHE_DIR/<kind>``, else ``qdm-deploy/<kind>`` in ``$XDG_CACHE_HOME`` (by default ``~/.cache``).

    Raises:
        EnvironmentProblem: none is set, and the user has no home, as in a container that runs as any user.
    """
    own = os.environ.get("QDM_CACHE_DIR")
    root = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "qdm-deploy"
    try:
        return (root / kind).expanduser()
    except RuntimeError as error:
        raise EnvironmentProblem(
            "this user has no home folder to keep caches in; name a folder in the variable QDM_CACHE_DIR"
        ) from error


def trust_problem(folder: Path) -> str | None:
    """Why code should not be loaded from this folder: who else could put it there. None where nobody can."""
    status = folder.stat()
    if status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return None
    return f"belongs to user {status.st_uid} with mode {stat.S_IMODE(status.st_mode):04o}"
