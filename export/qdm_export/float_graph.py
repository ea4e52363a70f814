"""The float32 step graph as ONNX: exported once per model, the source of every target graph.

Nodes keep the module path they came from (metadata ``qdm.module``), which is how later stages find the layer of a
convolution; weight initializer names are no help, since the exporter shares equal tensors and renames folded ones. The
rest of the exporter's metadata goes: it holds stack traces with paths of the machine that ran it.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir
import torch

from qdm_deploy.errors import ExportError
from qdm_deploy.samplers.random_inputs import random_inputs
from qdm_export.metadata import MODULE_KEY
from qdm_export.passes.time_table import TimeTable
from qdm_export.step_graph import StepGraph

if TYPE_CHECKING:
    from qdm_export.unet import Checkpoint

__all__ = ["OPSET", "example_inputs", "export_float_graph", "quiet_exporter", "save_graph"]

# TensorRT 10.2+ and TensorRT-RTX read opset 21, which has the float16 QuantizeLinear and GroupNormalization we need.
OPSET = 21
_SCOPES = "pkg.torch.onnx.name_scopes"
# Tensors below this size stay inside the .onnx file: shapes and scalars should be readable without the data file.
_EXTERNAL_THRESHOLD_BYTES = 1024


def example_inputs(checkpoint: "Checkpoint", batch: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Random but valid inputs for the step graph, in its input order."""
    inputs = random_inputs(checkpoint.denoiser, batch, seed)
    return tuple(torch.from_numpy(inputs[spec.name]) for spec in checkpoint.denoiser.interface)


def export_float_graph(checkpoint: "Checkpoint") -> ir.Model:
    """Export the step graph of ``checkpoint`` in float32 with a dynamic batch.

    Raises:
        ExportError: the exporter failed, or the graph lost its dynamic batch axis.
    """
    denoiser = checkpoint.denoiser
    module = StepGraph(checkpoint.unet, denoiser).eval()
    names = list(denoiser.interface.input_names)
    batch = torch.export.Dim("batch", min=1, max=1024)
    # Batch 2: torch.export specialises an example size of 1 to a constant.
    inputs = example_inputs(checkpoint, batch=2)
    try:
        with quiet_exporter():
            program = torch.onnx.export(
                module,
                inputs,
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=((tuple({0: batch} for _ in names)),),
                input_names=names,
                output_names=list(denoiser.interface.output_names),
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise ExportError(f"torch could not export the step graph of {checkpoint.source}: {error}") from error
    if program is None:
        raise ExportError(f"torch exported nothing for {checkpoint.source}")
    model = program.model
    model.graph.name = "step"
    for node in model.graph:
        path = _module_path(node)
        node.metadata_props.clear()
        if path:
            node.metadata_props[MODULE_KEY] = path
    for value in ir.convenience.create_value_mapping(model.graph).values():
        value.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    if not denoiser.interface.fractional_timesteps:
        TimeTable(denoiser.num_train_timesteps)(model)
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is None or isinstance(value.shape[0], int):
            raise ExportError(f"{value.name} lost its dynamic batch in the export: shape {value.shape}")
    return model


def _module_path(node: ir.Node) -> str:
    """The innermost module a node was traced in, such as "net.unet.conv_in"; "" for the sampler update."""
    scopes = [part.strip(" '\"") for part in node.metadata_props.get(_SCOPES, "").strip("[]").split(",")]
    return max((scope for scope in scopes if scope.split(".")[0] == "net"), key=len, default="")


def save_graph(model: ir.Model, path: Path, *, weights: str | None = None) -> None:
    """Write ``model`` to ``path``; with ``weights`` its larger tensors go to that file beside it (bare name)."""
    if weights is None:
        ir.save(model, path)
    else:
        ir.save(model, path, external_data=weights, size_threshold_bytes=_EXTERNAL_THRESHOLD_BYTES)


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """Keep the exporter's progress lines and notes about packages we do not use off the user's terminal."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
