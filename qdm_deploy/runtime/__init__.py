"""What every backend shares: the session's contract, rows of a batch, and the timestep loop."""

from qdm_deploy.runtime.denoise import Conditioning, denoise
from qdm_deploy.runtime.session import StepInputs, StepLoop, StepOutput, StepSession

__all__ = ["Conditioning", "StepInputs", "StepLoop", "StepOutput", "StepSession", "denoise"]
