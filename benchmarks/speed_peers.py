"""What a user would run instead of ours: PyTorch in several forms, ONNX Runtime's own INT8, NNCF's INT8 on OpenVINO."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import onnx_ir as ir
import torch
from bench import Case, write_float
from peer_models import CALIBRATION_STEPS, CalibrationMethod, Rows, quantized_static

from qdm_deploy.pipeline.simulation import TorchSession
from qdm_deploy.runtime import OnnxRuntimeSession, OpenVinoSession, StepSession
from qdm_deploy.runtime.openvino_session import import_openvino
from qdm_deploy.samplers import step_table
from qdm_export.step_graph import StepGraph
from qdm_export.topology import MODULE_KEY

__all__ = ["PEERS", "Missing", "Peer"]


class Missing(Exception):
    """A peer that this machine does not have; the message says what it needs."""


@dataclass(frozen=True)
class Peer:
    """How a peer is opened for a model, with a folder of its own, and whether its products are integers."""

    opened: Callable[[Case, Path], StepSession]
    integer: bool


class _Autocast(StepGraph):
    """The U-Net with bfloat16 products where PyTorch thinks them safe; the sampler's update stays float32."""

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One step."""
        with torch.autocast("cpu", dtype=torch.bfloat16):
            next_sample, x0 = super().forward(*inputs)
        return next_sample.float(), x0.float()


def _eager(model: Case, folder: Path) -> StepSession:
    return TorchSession(StepGraph(model.checkpoint.unet, model.checkpoint.spec).eval(), "float")


def _bf16(model: Case, folder: Path) -> StepSession:
    return TorchSession(_Autocast(model.checkpoint.unet, model.checkpoint.spec).eval(), "bf16")


def _compiled(model: Case, folder: Path) -> StepSession:
    step = StepGraph(model.checkpoint.unet, model.checkpoint.spec).eval()
    # In place: the session asks the module for its inputs.
    step.compile()
    return TorchSession(step, "compiled")


def _static(model: Case, folder: Path) -> StepSession:
    return quantized_static(model, CalibrationMethod.MinMax, folder)


def _sampler_nodes(model: Case) -> list[str]:
    """Names of the step graph's nodes that are no part of the U-Net: those that its last layer does not depend on."""
    inside: set[ir.Node] = set()
    waiting = [[node for node in model.graph.graph if MODULE_KEY in node.metadata_props][-1]]
    while waiting:
        node = waiting.pop()
        if node not in inside:
            inside.add(node)
            producers = [value.producer() for value in node.inputs if value is not None]
            waiting += [producer for producer in producers if producer is not None]
    return [node.name for node in model.graph.graph if node not in inside and node.name is not None]


def _nncf(model: Case, folder: Path) -> StepSession:
    """NNCF's post-training quantization, mixed preset, on the calibration rows that ours has."""
    if find_spec("nncf") is None:
        raise Missing("pip install nncf")
    ov = import_openvino()
    import nncf

    source = write_float(model, folder)
    with OnnxRuntimeSession(source) as session:
        names = session.input_names
    rows = Rows(model.calibration, step_table(model.schedule, "ddim", CALIBRATION_STEPS), names)
    batches = iter(rows.get_next, None)
    quantized = nncf.quantize(
        ov.Core().read_model(source),
        nncf.Dataset(list(batches)),
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(rows),
        # The sampler's update stays float, as in the other peers. Some of its nodes OpenVINO folds away as it reads.
        ignored_scope=nncf.IgnoredScope(names=_sampler_nodes(model), validate=False),
    )
    session = OpenVinoSession(source)
    # The session reads ONNX only; NNCF's result is OpenVINO's own form of the same graph.
    session._model = quantized
    return session


PEERS: Mapping[str, Peer] = {
    "torch eager FP32": Peer(_eager, integer=False),
    "torch eager BF16": Peer(_bf16, integer=False),
    "torch.compile FP32": Peer(_compiled, integer=False),
    "quantize_static INT8": Peer(_static, integer=True),
    "NNCF INT8": Peer(_nncf, integer=True),
}
