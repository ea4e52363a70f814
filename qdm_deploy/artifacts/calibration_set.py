"""The calibration set: network inputs met on the full-precision sampler's own trajectory."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.artifacts.record import read_record, write_record
from qdm_deploy.errors import CalibrationError

__all__ = ["CalibrationSet"]

_KIND = "qdm-calibration-set"
_VERSION = 1
_CONDITIONING = "conditioning."


@dataclass(frozen=True)
class CalibrationSet:
    """N network inputs, each with the timestep and the conditioning it was met under.

    Attributes:
        sample: x_t, [N, C, H, W] float32, as the network sees it.
        timestep: t, [N] int64.
        seed: request seed of the trajectory the row comes from, [N] int64; it names the noise.
        step: index of the row's step in the sampler's table, [N] int64.
        conditioning: the network's conditioning inputs by name, each [N, ...].
        provenance: how the set was made (JSON values): model, sampler, steps, strategy, guidance, tool versions.
    """

    sample: NDArray[np.float32]
    timestep: NDArray[np.int64]
    seed: NDArray[np.int64]
    step: NDArray[np.int64]
    conditioning: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse a set that calibration could silently learn nothing, or nonsense, from."""
        rows = len(self.sample)
        if rows == 0:
            raise CalibrationError("the calibration set is empty; ask for at least one sample per step")
        for name, values in {
            "timestep": self.timestep,
            "seed": self.seed,
            "step": self.step,
            **self.conditioning,
        }.items():
            if len(values) != rows:
                raise CalibrationError(f"the calibration set has {rows} samples but {len(values)} values of {name}")
        bad = np.flatnonzero(~np.isfinite(self.sample).all(axis=(1, 2, 3)))
        if len(bad):
            raise CalibrationError(
                f"{len(bad)} of {rows} calibration samples hold NaN or infinity (first: row {bad[0]}, "
                f"timestep {self.timestep[bad[0]]}); the full-precision model diverges there: check the checkpoint and "
                "the sampler"
            )

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.sample)

    def save(self, path: Path) -> None:
        """Write the set to one safetensors file, provenance in its metadata."""
        arrays: dict[str, NDArray[Any]] = {
            "sample": self.sample,
            "timestep": self.timestep,
            "seed": self.seed,
            "step": self.step,
        }
        arrays |= {_CONDITIONING + name: values for name, values in self.conditioning.items()}
        write_record(path, kind=_KIND, version=_VERSION, document={"provenance": dict(self.provenance)}, arrays=arrays)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a set that ``save`` wrote.

        Raises:
            InputError: the file is no calibration set, is truncated, or is newer than this version.
        """
        document, arrays = read_record(path, kind=_KIND, version=_VERSION)
        provenance = document.get("provenance")
        conditioning = {
            name.removeprefix(_CONDITIONING): a for name, a in arrays.items() if name.startswith(_CONDITIONING)
        }
        missing = [name for name in ("sample", "timestep", "seed", "step") if name not in arrays]
        if missing or not isinstance(provenance, dict):
            raise CalibrationError(
                f"{path} is not a whole calibration set: it lacks {', '.join(missing) or 'its provenance'}"
            )
        return cls(
            arrays["sample"],
            arrays["timestep"],
            arrays["seed"],
            arrays["step"],
            conditioning=conditioning,
            provenance=provenance,
        )
