"""What every backend shares: the session's contract, parts of a batch, and the timestep loop."""

from qdm_deploy.runtime.denoise import denoise
from qdm_deploy.runtime.session import StepInputs, StepLoop, StepOutput, StepSession

__all__ = ["StepInputs", "StepLoop", "StepOutput", "StepSession", "denoise"]
