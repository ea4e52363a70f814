"""Sessions by name, so that another process, or another machine, can open what was prepared here.

The process that runs a compiled graph need not import PyTorch, so nothing here does until it is asked to.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from qdm_deploy.backends import OnnxRuntimeSession, OpenVinoSession
from qdm_deploy.backends.openvino.graph import import_openvino
from qdm_deploy.runtime import StepSession


class HintedSession(OpenVinoSession):
    """OpenVINO with its bf16 hint on everything, as its users give it: nothing is kept exact."""

    def __init__(self, graph: Path, **options: Any) -> None:
        """Open ``graph``."""
        super().__init__(graph, precision="f32", **options)
        self._options["INFERENCE_PRECISION_HINT"] = "bf16"


def nncf_session(graph: Path, **options: Any) -> StepSession:
    """NNCF's result, which is OpenVINO's own form of the graph and stands beside ``graph``; our session reads ONNX."""
    session = OpenVinoSession(graph, **options)
    session._model = import_openvino().Core().read_model(graph.with_name("nncf.xml"))
    return session


def torch_session(graph: Path, form: str) -> StepSession:
    """The U-Net of the model called ``graph.name`` in PyTorch, eager or compiled."""
    from lib.case import checkpoint_of

    from qdm_deploy.building.simulation import TorchSession
    from qdm_export.step_graph import StepGraph

    checkpoint = checkpoint_of(graph.name)
    step = StepGraph(checkpoint.unet, checkpoint.denoiser).eval()
    if form == "compile FP32":
        # In place: the session asks the module for its inputs.
        step.compile()
    return TorchSession(step, form)


SESSIONS: Mapping[str, Callable[..., StepSession]] = MappingProxyType(
    {
        "onnxruntime": OnnxRuntimeSession,
        "openvino": OpenVinoSession,
        "openvino, hinted": HintedSession,
        "nncf": nncf_session,
        "torch": torch_session,
    }
)


@dataclass(frozen=True)
class Opening:
    """A session that is not open yet: one of ``SESSIONS``, its graph, its options (JSON values)."""

    kind: str
    graph: Path
    options: Mapping[str, Any]

    def __call__(self) -> StepSession:
        """Open it."""
        return SESSIONS[self.kind](self.graph, **self.options)
