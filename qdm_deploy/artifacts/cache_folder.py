"""Where this machine keeps what it can make again: engines, samples of evaluations, measured choices."""

import os
from pathlib import Path

__all__ = ["cache_folder"]


def cache_folder(kind: str) -> Path:
    """``$QDM_CACHE_DIR/<kind>``, else ``qdm-deploy/<kind>`` in ``$XDG_CACHE_HOME`` (by default ``~/.cache``)."""
    own = os.environ.get("QDM_CACHE_DIR")
    root = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "qdm-deploy"
    return (root / kind).expanduser()
