"""``config.pbtxt``: a step graph as a model of Triton Inference Server.

Source: Triton's ``model_config.proto`` and docs/user_guide/model_configuration.md, model_repository.md. The batch axis
is not part of ``dims``; an input of one number a row has ``dims: [ 1 ]`` for clients and is reshaped to [B].
"""

from collections.abc import Sequence
from dataclasses import dataclass

from qdm_deploy.artifacts.step_interface import StepInterface

__all__ = ["TritonTensor", "config_text", "step_tensors"]

# A server that concatenates requests needs distances between rows in place of their numbers.
OFFSETS = {"unconditional_row": "unconditional_offset", "owner_row": "owner_offset"}
_TYPES = {"float32": "TYPE_FP32", "int64": "TYPE_INT64"}


@dataclass(frozen=True)
class TritonTensor:
    """An input or output of the step graph; ``shape`` is that of one row."""

    name: str
    dtype: str
    shape: tuple[int, ...]


def step_tensors(interface: StepInterface) -> tuple[tuple[TritonTensor, ...], tuple[TritonTensor, ...]]:
    """Inputs and outputs of a step graph, its row links as offsets (``qdm_export.relative_links``)."""
    inputs = (TritonTensor(OFFSETS.get(spec.name, spec.name), spec.dtype, spec.row_shape) for spec in interface.inputs)
    outputs = (TritonTensor(spec.name, spec.dtype, spec.row_shape) for spec in interface.outputs)
    return tuple(inputs), tuple(outputs)


def config_text(name: str, interface: StepInterface, backend: str, max_batch: int) -> str:
    """The text of ``config.pbtxt``.

    Args:
        name: of the model, and of its folder.
        interface: of the step graph.
        backend: "onnxruntime" (on the CPU) or "tensorrt" (a plan on the GPU).
        max_batch: rows that Triton may put together.
    """
    inputs, outputs = step_tensors(interface)
    head = {
        "onnxruntime": ('backend: "onnxruntime"', "KIND_CPU"),
        "tensorrt": ('platform: "tensorrt_plan"', "KIND_GPU"),
    }
    platform, kind = head[backend]
    return "\n".join(
        [
            f'name: "{name}"',
            platform,
            f"max_batch_size: {max_batch}",
            f"input [\n{_tensors(inputs)}\n]",
            f"output [\n{_tensors(outputs)}\n]",
            # Requests are put together at every step: timestep, coefficients and links are those of each row.
            "dynamic_batching { }",
            f"instance_group [ {{ count: 1, kind: {kind} }} ]",
            "",
        ]
    )


def _tensors(tensors: Sequence[TritonTensor]) -> str:
    return ",\n".join(_tensor(tensor) for tensor in tensors)


def _tensor(tensor: TritonTensor) -> str:
    dims = ", ".join(map(str, tensor.shape or (1,)))
    reshape = "" if tensor.shape else ", reshape: { shape: [ ] }"
    return f'  {{ name: "{tensor.name}", data_type: {_TYPES[tensor.dtype]}, dims: [ {dims} ]{reshape} }}'
