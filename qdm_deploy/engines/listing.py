"""The compiled kernels, read from what the builder says: its verbose log, or the engine inspector.

TensorRT-RTX prints the list of compiled kernels into its log when the verbosity is VERBOSE and the profiling verbosity
is DETAILED; that needs no GPU. One line per kernel, between a line ``Layers:`` and an empty line:

    Name: n, LayerType: t, Inputs: [ { Name: x, Dimensions: [-1,32,16,16], ..., Datatype: Int8, Format: ... }],
    Constants: [...], Outputs: [...], TacticName: ..., StreamId: 0, Metadata: [ONNX Layer: a][ONNX Layer: b]

The inspector gives the same facts as JSON; TensorRT 10 puts the element type into a sentence ("Format/Datatype"),
TensorRT 11 into a key of its own.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from qdm_deploy.engines.kernels import UNTOLD, Kernel, TensorFact, kind_of
from qdm_deploy.errors import EngineError

__all__ = ["kernels_from_inspector", "kernels_from_log"]

_HEAD = re.compile(r"^(?:VERBOSE )?Layers:$")
_KERNEL = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<type>[^,]*), Inputs: (?P<inputs>\[.*?\])"
    r"(?:, Constants: (?P<constants>\[.*?\]))?, Outputs: (?P<outputs>\[.*\]), TacticName: (?P<tactic>.*?)"
    r"(?:, StreamId: -?\d+)?(?:, Metadata: (?P<metadata>.*))?$"
)
_TENSOR = re.compile(r"\{ Name: .*?, Dimensions: \[(?P<shape>[^\]]*)\].*?Data[tT]ype: (?P<dtype>\w+)")
_NODE = re.compile(r"\[ONNX Layer: (.*?)\](?=[\x1e\x1f]|\[ONNX Layer: |\s*$)")
_DTYPES = (
    ("int8", "Int8"),
    ("bf16", "BFloat16"),
    ("bfloat16", "BFloat16"),
    ("fp16", "Half"),
    ("half", "Half"),
    ("fp32", "Float"),
    ("fp8", "FP8"),
    ("float", "Float"),
    ("int32", "Int32"),
    ("int64", "Int64"),
    ("bool", "Bool"),
    ("n/a", UNTOLD),
)


def kernels_from_log(log: str) -> tuple[Kernel, ...]:
    """The kernels a builder log lists, in order.

    Raises:
        EngineError: The log holds no list, or a line of it has another form than the one known here.
    """
    # Not splitlines: TensorRT separates node names by a control character that splitlines takes for a line end.
    lines = iter(log.split("\n"))
    if not any(_HEAD.match(line) for line in lines):
        raise EngineError(
            "the builder's log holds no list of compiled layers ('Layers:'), so nothing can be said about INT8; "
            "it is printed by TensorRT-RTX 1.7 with a VERBOSE logger and DETAILED profiling verbosity"
        )
    kernels = []
    for line in lines:
        if not line.strip():
            break
        kernels.append(_kernel_of_line(line))
    return _some(kernels, "the builder's log")


def kernels_from_inspector(text: str) -> tuple[Kernel, ...]:
    """The kernels in the engine inspector's JSON, of TensorRT 10 or 11.

    Raises:
        EngineError: It is not that JSON, or holds layer names only.
    """
    try:
        document = json.loads(text)
    except ValueError as error:
        raise EngineError(f"the engine inspector's answer is not JSON: {error}") from error
    layers = document.get("Layers") if isinstance(document, dict) else None
    if not isinstance(layers, list):
        raise EngineError(f"the engine inspector's answer has no list 'Layers'; it begins with {text[:80]!r}")
    if any(not isinstance(layer, dict) for layer in layers):
        raise EngineError(
            "the engine inspector knows only the names of the layers; the engine must be built with DETAILED "
            "profiling verbosity"
        )
    return _some([_kernel_of_layer(layer) for layer in layers], "the engine inspector's answer")


def _some(kernels: list[Kernel], where: str) -> tuple[Kernel, ...]:
    if not kernels:
        raise EngineError(f"{where} lists no layer at all")
    return tuple(kernels)


def _kernel_of_line(line: str) -> Kernel:
    match = _KERNEL.match(line)
    if match is None:
        raise EngineError(
            f"a line of the builder's layer list has a form this version cannot read: {line[:200]!r}; please report "
            "it together with the TensorRT version"
        )
    return _kernel(
        match["name"],
        match["type"],
        match["tactic"],
        _tensors_of_text(match["inputs"]),
        _tensors_of_text(match["constants"] or ""),
        _tensors_of_text(match["outputs"]),
        match["metadata"] or "",
    )


def _tensors_of_text(text: str) -> tuple[TensorFact, ...]:
    return tuple(
        TensorFact(dtype=found["dtype"], shape=tuple(int(size) for size in found["shape"].split(",") if size.strip()))
        for found in _TENSOR.finditer(text)
    )


def _kernel_of_layer(layer: Mapping[str, Any]) -> Kernel:
    constants = _tensors_of_json(layer.get("Constants", ()))
    weights = layer.get("Weights")
    if not constants and isinstance(weights, Mapping) and "Type" in weights:
        constants = (TensorFact(dtype=_dtype(str(weights["Type"])), shape=(int(weights.get("Count", 0)),)),)
    return _kernel(
        str(layer.get("Name", "")),
        str(layer.get("LayerType", "")),
        str(layer.get("TacticName", "")),
        _tensors_of_json(layer.get("Inputs", ())),
        constants,
        _tensors_of_json(layer.get("Outputs", ())),
        str(layer.get("Metadata", "")),
    )


def _tensors_of_json(tensors: Any) -> tuple[TensorFact, ...]:
    facts = []
    for tensor in tensors:
        words = tensor.get("Datatype") or tensor.get("DataType") or tensor.get("Format/Datatype") or ""
        facts.append(
            TensorFact(dtype=_dtype(str(words)), shape=tuple(int(size) for size in tensor.get("Dimensions", ())))
        )
    return tuple(facts)


def _dtype(words: str) -> str:
    """The type in words like "Thirty-two wide channel vectorized row major Int8 format"; unknown words stay."""
    low = words.lower()
    return next((dtype for sign, dtype in _DTYPES if sign in low), words)


def _kernel(
    name: str,
    layer_type: str,
    tactic: str,
    inputs: tuple[TensorFact, ...],
    constants: tuple[TensorFact, ...],
    outputs: tuple[TensorFact, ...],
    metadata: str,
) -> Kernel:
    return Kernel(
        name=name,
        kind=kind_of(name, layer_type, tactic, inputs, outputs),
        layer_type=layer_type,
        tactic=tactic,
        inputs=inputs,
        constants=constants,
        outputs=outputs,
        onnx_nodes=tuple(_NODE.findall(metadata)),
    )
