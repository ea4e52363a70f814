"""OpenVINO with its bf16 hint on everything, as users give it: a peer, and the measure of what our session keeps.

A module of its own, because the process that runs it need not import PyTorch.
"""

from pathlib import Path
from typing import Any

from qdm_deploy.backends import OpenVinoSession

__all__ = ["HintedSession"]


class HintedSession(OpenVinoSession):
    """A session without ``keep_float32`` and ``keep_weights_exact``."""

    def __init__(self, graph: Path, **options: Any) -> None:
        """Open ``graph``."""
        super().__init__(graph, precision="f32", **options)
        self._options["INFERENCE_PRECISION_HINT"] = "bf16"
