"""What a caller asks of one run beside the sampler's name."""

from collections.abc import Sequence
from dataclasses import dataclass

from qdm_deploy.samplers.scheduler_config import SigmaSchedule

__all__ = ["RunOptions"]


@dataclass(frozen=True)
class RunOptions:
    """Options of ``step_table``, checked; None means that the sampler's or the config's own value holds.

    ``first_step`` counts rows of the whole run; a sampler that looks back starts afresh there.
    """

    steps: int
    eta: float = 0.0
    use_clipped_model_output: bool = False
    sigmas: SigmaSchedule | Sequence[float] | None = None
    timesteps: Sequence[float] | None = None
    original_inference_steps: int | None = None
    first_step: int = 0
    learned_variance: bool = False
