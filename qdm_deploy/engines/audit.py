"""What a built engine really computes in INT8, beside what the plan asked for.

A graph full of Q/DQ pairs does not make an INT8 engine: a Cast on the way to the convolution can be enough to leave it
in floating point, and so can the GPU's generation, both without a warning. So the compiled kernels are read back
(``listing``) and matched with the ONNX nodes by name; the parser's own log says which node is a weighted operator, what
weights it reads and whether both its operands are dequantized.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from qdm_deploy.engines.kernels import Kernel
from qdm_deploy.engines.listing import kernels_from_inspector, kernels_from_log
from qdm_deploy.errors import EngineError

__all__ = ["EngineAudit", "LayerFailure", "PlannedLayer", "WeightedNode", "audit_of_files"]

_OPERATORS = ("Conv", "ConvTranspose", "MatMul", "Gemm")
_IMPORTED = re.compile(r"^VERBOSE (?P<node>.+) \[(?P<operator>\w+)\] (?P<side>inputs|outputs): (?P<tensors>.*)$")
_TENSOR = re.compile(r"\[(\S.*?) -> \((.*?)\)\[\w+\]\]")
_BLOCK = re.compile(r"(?:\w+\.)+(?:resnets|attentions)\.\d+")
_WEIGHT_STEPS = ("DequantizeLinear", "Transpose", "Reshape", "Cast", "Identity")


@dataclass(frozen=True)
class PlannedLayer:
    """A layer that shall run in INT8.

    Attributes:
        name: The ONNX node's name, or the name of its weight initializer.
        kind: "convolution" or "gemm".
    """

    name: str
    kind: Literal["convolution", "gemm"] = "convolution"


@dataclass(frozen=True)
class LayerFailure:
    """A planned layer that is not INT8 in the engine, and why that is said."""

    name: str
    reason: str


class WeightedNode(BaseModel):
    """A convolution or matrix product of the ONNX graph, as the parser saw it.

    ``weight`` names the tensor behind the second operand (the initializer, through its DequantizeLinear); ``quantized``
    says that both operands come straight from a DequantizeLinear.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    operator: str
    weight: str
    weight_shape: tuple[int, ...]
    quantized: bool

    @property
    def kind(self) -> Literal["convolution", "gemm"]:
        """The kind of kernel that runs it."""
        return "convolution" if self.operator.startswith("Conv") else "gemm"


class EngineAudit(BaseModel):
    """The compiled kernels of one engine and the weighted nodes of its graph."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kernels: tuple[Kernel, ...]
    nodes: tuple[WeightedNode, ...]

    @classmethod
    def from_build(cls, log: str, inspector: str | None = None) -> Self:
        """Read a build's log, and the inspector's JSON where the engine could be inspected.

        Raises:
            EngineError: Neither holds a layer list that can be read.
        """
        kernels = kernels_from_log(log) if inspector is None else kernels_from_inspector(inspector)
        return cls(kernels=kernels, nodes=_weighted_nodes(log))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The audit that ``to_json`` wrote; ``EngineError`` for anything else."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise EngineError(f"this is not an engine audit: {error.errors()[0]['msg']}") from error

    def to_json(self) -> str:
        """The audit as JSON, one line per kernel and node."""
        document = self.model_dump(mode="json")
        parts = (f'"{key}":[\n' + ",\n".join(json.dumps(row) for row in rows) + "\n]" for key, rows in document.items())
        return "{" + ",".join(parts) + "}\n"

    def summary(self) -> dict[str, int]:
        """Counts of kernels: all, per kind, INT8 ones, and Q/DQ round trips without INT8 work.

        ``kernels`` leaves out what the list holds besides: waits between streams ("synchronizations") and shape
        arithmetic on the host ("others" has it, with what could not be told).
        ``planned`` counts the graph's nodes with both operands dequantized, ``planned_int8`` those that are INT8 in the
        engine.
        """
        kinds = Counter(kernel.kind for kernel in self.kernels)
        planned = self.quantized_layers()
        return {
            "kernels": len(self.kernels) - kinds["sync"] - kinds["shape"],
            "convolutions": kinds["convolution"],
            "convolutions_int8": self._int8("convolution"),
            "gemms": kinds["gemm"],
            "gemms_int8": self._int8("gemm"),
            "attentions": kinds["attention"],
            "generated": kinds["generated"],
            "moves": kinds["move"],
            "reformats": kinds["reformat"],
            "casts": kinds["cast"],
            "quantizes": kinds["quantize"],
            "requantizes": kinds["requantize"],
            "quantized_transposes": kinds["quantized_transpose"],
            "dequantizes": kinds["dequantize"],
            "fake_quantizes": kinds["fake_quantize"],
            "round_trips": sum(kernel.round_trips for kernel in self.kernels),
            "synchronizations": kinds["sync"],
            "others": kinds["shape"] + kinds["other"],
            "planned": len(planned),
            "planned_int8": len(planned) - len(self.failures(planned)),
        }

    def kernels_per_block(self) -> dict[str, int]:
        """Kernels of each residual and attention block, in execution order.

        A kernel belongs to the first block that one of its ONNX nodes is named after; the nodes of quantized layers
        carry their layer's name. An engine of a float graph, whose nodes are numbered, has no such names.
        """
        counts: Counter[str] = Counter()
        for kernel in self.kernels:
            blocks = (match[0] for node in kernel.onnx_nodes if (match := _BLOCK.search(node)))
            first = next(blocks, None)
            if first is not None and kernel.kind not in ("sync", "shape"):
                counts[first] += 1
        return dict(counts)

    def quantized_layers(self) -> tuple[PlannedLayer, ...]:
        """The layers that the graph itself asks to run in INT8: both operands come from a DequantizeLinear."""
        return tuple(PlannedLayer(node.name, node.kind) for node in self.nodes if node.quantized)

    def failures(self, planned: Iterable[PlannedLayer]) -> tuple[LayerFailure, ...]:
        """The planned layers that are not INT8 in this engine, in the order given.

        Layers are found by node name or weight name. An engine that names no ONNX node at all is judged by the number
        of INT8 kernels of each kind.
        """
        planned = tuple(planned)
        if not any(kernel.onnx_nodes for kernel in self.kernels):
            return self._failures_by_count(planned)
        names = {node.weight: node.name for node in self.nodes} | {node.name: node.name for node in self.nodes}
        failures = []
        for layer in planned:
            # Without the parser's lines there is nothing to look the name up in; then it must be the node's own.
            reason = self._reason(names.get(layer.name) if names else layer.name, layer.name)
            if reason is not None:
                failures.append(LayerFailure(layer.name, reason))
        return tuple(failures)

    def _reason(self, node: str | None, asked: str) -> str | None:
        if node is None:
            return f"the graph has no convolution or matrix product with the node or weight name '{asked}'"
        running = [kernel for kernel in self.kernels if node in kernel.onnx_nodes]
        working = [kernel for kernel in running if kernel.kind in ("convolution", "gemm", "attention")]
        if not working:
            where = ", ".join(kernel.name for kernel in running) or "no kernel at all"
            return f"it has no convolution or GEMM kernel of its own; it runs in {where}"
        if any(kernel.is_int8 for kernel in working):
            return None
        kernel = working[0]
        weight = kernel.weight
        operands = [kernel.inputs[0].dtype if kernel.inputs else "?", weight.dtype if weight else "?"]
        what = f"{operands[0]} activations with {operands[1]} weights"
        return f"kernel {kernel.name} ({kernel.layer_type}) multiplies {what}"

    def _failures_by_count(self, planned: tuple[PlannedLayer, ...]) -> tuple[LayerFailure, ...]:
        failures = []
        for kind, wanted in Counter(layer.kind for layer in planned).items():
            found = self._int8(kind)
            if found < wanted:
                reason = (
                    f"{found} INT8 kernels for {wanted} planned layers; the engine names no ONNX nodes to tell which"
                )
                failures += [LayerFailure(f"one of {wanted} {kind} layers", reason)] * (wanted - found)
        return tuple(failures)

    def _int8(self, kind: str) -> int:
        return sum(kernel.kind == kind and kernel.is_int8 for kernel in self.kernels)


def audit_of_files(log: Path, layers: Path) -> EngineAudit:
    """The audit of a build from the files it wrote: its log, and the inspector's JSON where there is one."""
    inspector = layers.read_text(encoding="utf-8") if layers.exists() else None
    return EngineAudit.from_build(log.read_text(encoding="utf-8", errors="replace"), inspector)


def _weighted_nodes(log: str) -> tuple[WeightedNode, ...]:
    """Convolutions and matrix products from the parser's lines "node [Conv] inputs: [x -> (1, 3)[HALF]], ..."."""
    inputs: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    operators: dict[str, str] = {}
    producer: dict[str, str] = {}
    for line in log.split("\n"):
        match = _IMPORTED.match(line)
        if match is None:
            continue
        node = match["node"]
        operators[node] = match["operator"]
        tensors = [(name, _shape(shape)) for name, shape in _TENSOR.findall(match["tensors"])]
        if match["side"] == "inputs":
            inputs[node] = tensors
        else:
            producer.update((name, node) for name, _ in tensors)

    def operator_behind(tensor: str) -> str:
        return operators.get(producer.get(tensor, ""), "")

    def weight_behind(tensor: str) -> str:
        while operator_behind(tensor) in _WEIGHT_STEPS:
            tensor = inputs[producer[tensor]][0][0]
        return tensor

    return tuple(
        WeightedNode(
            name=node,
            operator=operators[node],
            weight=weight_behind(tensors[1][0]),
            weight_shape=tensors[1][1],
            quantized=all(operator_behind(tensor) == "DequantizeLinear" for tensor, _ in tensors[:2]),
        )
        for node, tensors in inputs.items()
        if operators[node] in _OPERATORS and len(tensors) >= 2
    )


def _shape(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split(",") if size.strip())
