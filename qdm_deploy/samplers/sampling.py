"""What decides the samples of a run, in one value: steps, seeds, conditions, guidance, size."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.artifacts.step_interface import StepInterface
from qdm_deploy.errors import InputError
from qdm_deploy.samplers.conditioning import Conditioning, check_conditioning
from qdm_deploy.samplers.noise import initial_noise
from qdm_deploy.samplers.table import StepTable

__all__ = ["Sampling"]


@dataclass(frozen=True, eq=False)
class Sampling:
    """N samples to make. A sample depends on its own seed and conditions, not on those beside it.

    Attributes:
        table: the sampler's steps.
        seeds: N seeds, 0 .. 2**63 - 1; equal seeds give equal samples.
        conditioning: of the N samples; empty for an unconditional model.
        guidance: scale of classifier-free guidance (Ho and Salimans 2022, eq. 6, with scale = w + 1); 1 is none and
            runs one row for a sample, any other value runs two.
        guidance_rescale: how far the guided output takes back the spread of the unguided one, 0 to 1
            (arXiv 2305.08891, section 3.4).
        size: height and width of a sample; None is the model's own.
        initial: [N, C, H, W] float32 to start from; None starts from the seeds' Gaussian noise.
    """

    table: StepTable
    seeds: Sequence[int]
    conditioning: Conditioning = field(default_factory=Conditioning)
    guidance: float = 1.0
    guidance_rescale: float = 0.0
    size: tuple[int, int] | None = None
    initial: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.seeds)

    @property
    def rows_each(self) -> int:
        """Rows of a batch that one sample takes: 2 where it is guided."""
        return 1 if self.guidance == 1.0 else 2

    def take(self, rows: slice) -> "Sampling":
        """Some of the samples."""
        return replace(
            self,
            seeds=self.seeds[rows],
            conditioning=self.conditioning.take(rows),
            initial=None if self.initial is None else self.initial[rows],
        )

    def start(self, shape: tuple[int, int, int]) -> NDArray[np.float32]:
        """What the first step gets, [N, C, H, W] float32.

        Raises:
            InputError: ``initial`` has another shape.
        """
        if self.initial is None:
            noise = initial_noise(self.seeds, shape)
            return noise if self.table.initial_scale == 1.0 else noise * np.float32(self.table.initial_scale)
        if self.initial.shape != (len(self), *shape):
            raise InputError(f"initial has the shape {list(self.initial.shape)}; give {[len(self), *shape]}")
        return self.initial

    def check(self, interface: StepInterface) -> None:
        """Refuse what a step graph cannot run.

        Raises:
            InputError: seeds, conditions, guidance or the sampler's table do not fit the graph or each other.
        """
        if not self.seeds:
            raise InputError("no seeds were given; give one seed for each sample")
        for name, value in (("guidance scale", self.guidance), ("guidance rescale", self.guidance_rescale)):
            if not abs(value) <= float(np.finfo(np.float32).max):  # NaN too
                raise InputError(f"the {name} is {value}; give a finite number")
        if self.guidance_rescale and "guidance_rescale" not in interface.input_names:
            raise InputError("this model's guidance cannot be rescaled; leave the rescale at 0")
        check_conditioning(interface, self.conditioning, len(self), guided=self.rows_each == 2)
        width = self.table.coefficients.shape[1]
        if width != interface.num_coefficients:
            raise InputError(
                f"the sampler's table has {width} coefficients a step and the step graph takes "
                f"{interface.num_coefficients}: make it with learned_variance={interface.num_coefficients > width}"
            )
        if not (interface.fractional_timesteps or self.table.has_whole_timesteps):
            raise InputError(
                f"the sampler {self.table.sampler!r} has timesteps between whole ones here, and this model's time "
                "table holds whole ones only; choose other sigmas, another spacing or another sampler"
            )
