"""What a user would run instead of ours: PyTorch in several forms, ONNX Runtime's own INT8, NNCF's INT8 on OpenVINO."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import onnx_ir as ir
import torch
from lib.bench import Case, checkpoint_of, write_exported
from lib.nncf_form import openvino_form
from lib.peer_models import CALIBRATION_STEPS, CalibrationMethod, Rows, quantized_static

from qdm_deploy.backends import OnnxRuntimeSession
from qdm_deploy.backends.openvino.graph import import_openvino
from qdm_deploy.building.simulation import TorchSession
from qdm_deploy.runtime import StepSession
from qdm_deploy.samplers import step_table
from qdm_export.step_graph import StepGraph
from qdm_export.topology import MODULE_KEY

__all__ = ["PEERS", "Missing", "Opened", "Peer"]

Opened = Callable[[], StepSession]


class Missing(Exception):
    """A peer that this machine does not have; the message says what it needs."""


@dataclass(frozen=True)
class Peer:
    """How a peer is made ready for a model, in a folder of its own, and whether its products are integers.

    What ``prepared`` returns opens the session, and can be sent to another process.
    """

    prepared: Callable[[Case, Path], Opened]
    integer: bool


class _Autocast(StepGraph):
    """The U-Net with bfloat16 products where PyTorch thinks them safe; the sampler's update stays float32."""

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One step."""
        with torch.autocast("cpu", dtype=torch.bfloat16):
            next_sample, x0 = super().forward(*inputs)
        return next_sample.float(), x0.float()


_Torch = Literal["eager FP32", "eager BF16", "compile FP32"]


def _torch_session(kind: _Torch, name: str) -> StepSession:
    checkpoint = checkpoint_of(name)
    step = (_Autocast if kind == "eager BF16" else StepGraph)(checkpoint.unet, checkpoint.spec).eval()
    if kind == "compile FP32":
        # In place: the session asks the module for its inputs.
        step.compile()
    return TorchSession(step, kind)


def _torch(kind: _Torch) -> Peer:
    return Peer(lambda model, folder: partial(_torch_session, kind, model.name), integer=False)


def _static(model: Case, folder: Path) -> Opened:
    """`quantize_static` as its user calls it: on the graph as exported."""
    quantized_static(model, CalibrationMethod.MinMax, folder, write_exported(model, folder)).close()
    return partial(OnnxRuntimeSession, folder / "static.onnx")


def _static_on_ours(model: Case, folder: Path) -> Opened:
    """The same on the float graph of our bundle."""
    quantized_static(model, CalibrationMethod.MinMax, folder).close()
    return partial(OnnxRuntimeSession, folder / "static.onnx")


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


def _nncf(model: Case, folder: Path, mode: Literal["latency", "throughput"] = "latency") -> Opened:
    """NNCF's post-training quantization, mixed preset, on the calibration rows that ours has."""
    if find_spec("nncf") is None:
        raise Missing("pip install nncf")
    source, result = folder / "float.onnx", folder / "nncf.xml"
    if not result.exists():
        ov = import_openvino()
        import nncf

        with OnnxRuntimeSession(write_exported(model, folder)) as session:
            names = session.input_names
        rows = Rows(model.calibration, step_table(model.schedule, "ddim", CALIBRATION_STEPS), names)
        batches = iter(rows.get_next, None)
        quantized = nncf.quantize(
            ov.Core().read_model(source),
            nncf.Dataset(list(batches)),
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(rows),
            # The sampler's update stays float, as in the other peers. Some of its nodes OpenVINO folds away as it
            # reads.
            ignored_scope=nncf.IgnoredScope(names=_sampler_nodes(model), validate=False),
        )
        ov.save_model(quantized, result, compress_to_fp16=False)
    return partial(openvino_form, source, result, mode)


def _nncf_in_parts(model: Case, folder: Path) -> Opened:
    """The same, its batches cut into parts as ours are."""
    return _nncf(model, folder.with_name("NNCF-INT8"), "throughput")


PEERS: Mapping[str, Peer] = {
    "torch eager FP32": _torch("eager FP32"),
    "torch eager BF16": _torch("eager BF16"),
    "torch.compile FP32": _torch("compile FP32"),
    "quantize_static INT8": Peer(_static, integer=True),
    "quantize_static INT8, our float graph": Peer(_static_on_ours, integer=True),
    "NNCF INT8": Peer(_nncf, integer=True),
    "NNCF INT8, throughput": Peer(_nncf_in_parts, integer=True),
}
