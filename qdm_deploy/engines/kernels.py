"""One compiled kernel of an engine and what it does, whoever described it.

TensorRT names a generated kernel after its operations, four letters each: ``__myl_SiluAddMulMinMaxRounCastGnor`` is a
group norm, a SiLU and a quantization (``MulMinMaxRounCast``) in one pass over memory. That name is what tells a kernel
that only moves or only quantizes data from one that computes.
"""

import math
import re
from typing import Literal

from pydantic import BaseModel, ConfigDict

__all__ = ["UNTOLD", "Kernel", "KernelKind", "TensorFact", "kind_of", "operations_of"]

KernelKind = Literal[
    "convolution",
    "gemm",
    "attention",
    "generated",
    "move",
    "reformat",
    "cast",
    "quantize",
    "requantize",
    "quantized_transpose",
    "dequantize",
    "fake_quantize",
    "shape",
    "sync",
    "other",
]

# The element type where TensorRT does not tell it: some layers of version 10, in an engine of dynamic shapes.
UNTOLD = "untold"
# Its own words for a kernel that multiplies 8-bit integers.
_INT8_TACTIC = re.compile(r"i8i8|i8i32|int8|imma")

# How the operations of a kernel that does nothing else read, data movement left out. The scaling of a quantization may
# have moved into the kernel before it, and the shift of a zero offset may ride along.
_QUANTIZE = re.compile(r"(Cast)?(Add|Sub)?(Mul)?MinMaxRounCast")
_DEQUANTIZE = re.compile(r"CastMul(Cast)*")
_ROUND_TRIP = "MinMaxRounCastCastMul"
_FAKE_QUANTIZE = re.compile(rf"(Cast)?(Add|Sub)?(Mul)?{_ROUND_TRIP}(Cast)*")
_MOVEMENT = {"Move", "Tran", "Resh"}
_PADDING = {"Repl", "Conc"}
_GENERATED_TYPES = ("kgen", "runtime_function", "runtime_fusion", "fusion", "pointwise", "scale", "myelin")


class TensorFact(BaseModel):
    """Element type in TensorRT's words ("Int8", "Half", "Float", ...; ``UNTOLD``) and shape, -1 for the batch."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dtype: str
    shape: tuple[int, ...] = ()

    @property
    def elements(self) -> int:
        """Number of elements of one batch row."""
        return abs(math.prod(self.shape))


class Kernel(BaseModel):
    """One row of the audit.

    Attributes:
        name: The engine's name for it; fused GEMMs join their nodes' names with "+".
        kind: What it does. "quantize" does nothing else; "quantized_transpose" also permutes the axes, a pass that a
            float engine makes as well; "requantize" reads codes and writes codes on another scale; "sync" orders two
            streams and is no kernel.
        layer_type: The library's own word: "correlation", "gemm", "kgen", "CaskConvolution", ...
        tactic: The kernel chosen; a stub where it is chosen only when the engine is loaded.
        inputs: Activations it reads.
        constants: Weights, scales and other constants it reads.
        outputs: What it writes.
        onnx_nodes: Names of the ONNX nodes it runs, wholly or in part.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    kind: KernelKind
    layer_type: str
    tactic: str
    inputs: tuple[TensorFact, ...]
    constants: tuple[TensorFact, ...]
    outputs: tuple[TensorFact, ...]
    onnx_nodes: tuple[str, ...]

    @property
    def weight(self) -> TensorFact | None:
        """The second operand of a convolution or GEMM: a constant where the weights are compiled in, else an input."""
        if self.kind not in ("convolution", "gemm"):
            return None
        # A convolution lists its weights first; a small fused GEMM its bias. Weights of one element are scales.
        constants = [tensor for tensor in self.constants if tensor.elements > 1]
        if constants:
            return constants[0] if self.kind == "convolution" else max(constants, key=lambda tensor: tensor.elements)
        return self.inputs[1] if len(self.inputs) > 1 else None

    @property
    def is_int8(self) -> bool:
        """Whether the arithmetic is INT8: both operands of a convolution, GEMM or attention are Int8."""
        if self.kind not in ("convolution", "gemm", "attention") or not self.inputs:
            return False
        second = self.inputs[1] if self.kind == "attention" and len(self.inputs) > 1 else self.weight
        told = {operand.dtype for operand in (self.inputs[0], second) if operand is not None} - {UNTOLD}
        if self.inputs[0].dtype == UNTOLD:
            return told <= {"Int8"} and _INT8_TACTIC.search(self.tactic.lower()) is not None
        return told == {"Int8"}

    @property
    def round_trips(self) -> int:
        """How often the kernel quantizes a value only to dequantize it again: cost without INT8 arithmetic."""
        return "".join(operations_of(self.name)).count(_ROUND_TRIP)


def operations_of(name: str) -> tuple[str, ...]:
    """The operations in a generated kernel's name: Mul, Cast, Add for ``__myl_MulCastAdd_myl0_5``; else ()."""
    match = re.match(r"_+myl_([A-Za-z]+?)(?:_myl|_0x|$)", name)
    return tuple(re.findall(r"[A-Z][a-z0-9]*", match[1])) if match else ()


def kind_of(
    name: str, layer_type: str, tactic: str, inputs: tuple[TensorFact, ...], outputs: tuple[TensorFact, ...]
) -> KernelKind:
    """What a kernel does, from its layer type, the operations in its name and its element types."""
    low = layer_type.lower()
    if low in ("correlation", "deconv") or "conv" in low:
        return "convolution"
    if low == "gemm" or "gemm" in low or "matrixmultiply" in low or "Fc" in operations_of(name):
        return "gemm"
    # The library's own names only: an ONNX node may be called "attention" and be a plain matrix product.
    if re.match(r"_+(?:gemm|myl)?_?f?mha", name.lower()) or re.search(r"f?mha_", tactic.lower()):
        return "attention"
    if low in ("shape_call", "shape", "constant", "noop"):
        return "shape"
    if low in ("signal", "wait"):
        return "sync"
    if low in ("quantize", "dequantize"):
        return "quantize" if low == "quantize" else "dequantize"
    if low.startswith("reformat"):
        return _kind_of_reformat(inputs, outputs)
    if low.startswith(_GENERATED_TYPES):
        return _kind_of_generated(operations_of(name), inputs, outputs)
    return "other"


def _kind_of_reformat(inputs: tuple[TensorFact, ...], outputs: tuple[TensorFact, ...]) -> KernelKind:
    read, written = ({tensor.dtype for tensor in tensors} for tensors in (inputs, outputs))
    if ("Int8" in read) != ("Int8" in written):
        return "quantize" if "Int8" in written else "dequantize"
    return "reformat"


def _kind_of_generated(
    operations: tuple[str, ...], inputs: tuple[TensorFact, ...], outputs: tuple[TensorFact, ...]
) -> KernelKind:
    work = tuple(operation for operation in operations if operation not in _MOVEMENT)
    if not operations:
        return "generated"
    if not work:
        return "reformat" if inputs else "move"
    if set(work) == {"Cast"}:  # named so even where only the layout changes
        return "reformat" if {t.dtype for t in inputs} == {t.dtype for t in outputs} else "cast"
    text = "".join(operation for operation in work if operation not in _PADDING)
    if _QUANTIZE.fullmatch(text):
        if {tensor.dtype for tensor in inputs} == {"Int8"}:
            return "requantize"
        return "quantized_transpose" if "Tran" in operations else "quantize"
    if _DEQUANTIZE.fullmatch(text):
        return "dequantize"
    return "fake_quantize" if _FAKE_QUANTIZE.fullmatch(text) else "generated"
