"""Blocks that reconstruction has finished, on disk, so that an interrupted run goes on where it stopped.

One file per block, named by the hash of everything its content depends on: network, plan, calibration set, options and
the block. Whatever changes, old files are not found rather than wrong.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from torch import nn

from qdm_deploy.artifacts.calibration_set import CalibrationSet
from qdm_deploy.artifacts.files import canonical_json
from qdm_deploy.artifacts.plan import QuantizationPlan
from qdm_deploy.artifacts.record import read_record, write_record
from qdm_deploy.errors import InputError

__all__ = ["FinishedBlocks"]

_KIND = "qdm-reconstructed-block"
_VERSION = 1


@dataclass(frozen=True)
class FinishedBlocks:
    """What one run may take over from an earlier one; ``folder`` None keeps nothing."""

    fingerprint: str
    folder: Path | None

    @classmethod
    def of(
        cls,
        stage: str,
        network: nn.Module,
        plan: QuantizationPlan,
        calibration: CalibrationSet,
        options: Mapping[str, Any],
        *,
        folder: Path | None,
    ) -> Self:
        """The files that belong to exactly this work."""
        if folder is None:
            return cls("", None)
        digest = hashlib.sha256(stage.encode())
        described = {name: value for name, value in options.items() if name != "folder"}
        digest.update(canonical_json(described))
        for name, weight in network.state_dict().items():
            _add(digest, name, weight.numpy())
        for layer in plan.layers:
            plain = {name: value for name, value in vars(layer).items() if not isinstance(value, np.ndarray)}
            place = asdict(plain.pop("layer"))
            digest.update(canonical_json({**plain, "layer": place, "notes": dict(layer.notes)}))
            for name, value in vars(layer).items():
                if isinstance(value, np.ndarray):
                    _add(digest, name, value)
        given: dict[str, NDArray[Any]] = {
            "sample": calibration.sample,
            "timestep": calibration.timestep,
            **calibration.conditioning,
        }
        for name, value in {"edges": plan.timestep_edges, **given}.items():
            _add(digest, name, value)
        return cls(digest.hexdigest(), folder)

    def read(self, block: str) -> tuple[dict[str, NDArray[Any]] | None, dict[str, float]]:
        """A finished block's arrays by layer and its errors; None where it is not there or not readable."""
        path = self._path(block)
        if path is None or not path.exists():
            return None, {}
        try:
            document, arrays = read_record(path, kind=_KIND, version=_VERSION)
        except InputError:
            return None, {}  # damaged, or of another version: it is made again and replaced
        return arrays, document["errors"]  # type: ignore[return-value]  # what write stored

    def write(self, block: str, arrays: Mapping[str, NDArray[Any]], errors: Mapping[str, float]) -> None:
        """Keep a finished block."""
        path = self._path(block)
        if path is not None:
            document = {"block": block, "errors": dict(errors)}
            write_record(path, kind=_KIND, version=_VERSION, document=document, arrays=dict(arrays))

    def _path(self, block: str) -> Path | None:
        if self.folder is None:
            return None
        return self.folder / f"{hashlib.sha256(f'{self.fingerprint}/{block}'.encode()).hexdigest()}.safetensors"


def _add(digest: "hashlib._Hash", name: str, values: NDArray[Any]) -> None:
    digest.update(f"{name} {values.dtype.str} {values.shape}".encode())
    digest.update(np.ascontiguousarray(values).tobytes())
