"""Sessions that run a step graph on this machine, one folder a backend, and which of them to take."""

from qdm_deploy.backends.onnxruntime.session import OnnxRuntimeSession
from qdm_deploy.backends.opening import BACKENDS, automatic_backend, choose_backend, open_session
from qdm_deploy.backends.openvino.session import OpenVinoSession
from qdm_deploy.backends.tensorrt.session import TensorRtSession

__all__ = [
    "BACKENDS",
    "OnnxRuntimeSession",
    "OpenVinoSession",
    "TensorRtSession",
    "automatic_backend",
    "choose_backend",
    "open_session",
]
