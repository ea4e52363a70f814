"""Running step graphs: sessions on CPU and GPU, the timestep loop, pictures, and what this machine can run."""

from qdm_deploy.runtime.backends import BACKENDS, automatic_backend, choose_backend, open_session
from qdm_deploy.runtime.denoise import Conditioning, denoise
from qdm_deploy.runtime.mixed_session import MixedSession
from qdm_deploy.runtime.onnxruntime_session import OnnxRuntimeSession
from qdm_deploy.runtime.openvino_session import OpenVinoSession
from qdm_deploy.runtime.session import StepInputs, StepLoop, StepOutput, StepSession
from qdm_deploy.runtime.tensorrt_session import TensorRtSession

__all__ = [
    "BACKENDS",
    "Conditioning",
    "MixedSession",
    "OnnxRuntimeSession",
    "OpenVinoSession",
    "StepInputs",
    "StepLoop",
    "StepOutput",
    "StepSession",
    "TensorRtSession",
    "automatic_backend",
    "choose_backend",
    "denoise",
    "open_session",
]
