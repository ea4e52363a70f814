"""NNCF's result as a session. A module of its own, because the process that runs it need not import PyTorch."""

from pathlib import Path
from typing import Literal

from qdm_deploy.backends import OpenVinoSession
from qdm_deploy.backends.openvino.graph import import_openvino
from qdm_deploy.runtime import StepSession

__all__ = ["openvino_form"]


def openvino_form(source: Path, form: Path, mode: Literal["latency", "throughput"]) -> StepSession:
    """NNCF's result is OpenVINO's own form of the graph; our session reads ONNX only."""
    session = OpenVinoSession(source, mode=mode)
    session._model = import_openvino().Core().read_model(form)
    return session
