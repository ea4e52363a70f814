"""From one float graph and one plan to the graph each target runs fastest.

===========  ================  =======================  =======  ========================  =====================
target       activation codes  outputs of convolutions  rest     zero offset               norms
===========  ================  =======================  =======  ========================  =====================
onnxruntime  u8                quantized too            float32  the zero point, 128 - z   InstanceNormalization
openvino     u8                not quantized            float32  the zero point, 128 - z   their moments
tensorrt     s8                not quantized            half     subtracted, constant map  GroupNormalization
===========  ================  =======================  =======  ========================  =====================

Half is float16, or bfloat16 for models that leave the range of float16 (docs/adr/0011). Layers that the plan keeps in
float are part of the rest, except that openvino's convolutions among them multiply bfloat16, as does attention
between many positions (docs/adr/0017). openvino's attention reads its operands as convolutions leave them
(docs/adr/0019), and its SiLU is a ratio of polynomials (docs/adr/0018). Both CPU targets look up what residual blocks
project the timestep to (docs/adr/0004).

Weight codes of 4 bits are stored as INT4 for the two CPU targets, which cast them to INT8 once, when they load the
graph. TensorRT's builder refuses a Cast that reads INT4 (TensorRT-RTX 1.7: "Int4 but is not consumed by"), so there
they stay INT8.
"""

from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir
from onnx_ir.passes import common

from qdm_deploy.artifacts.plan import TARGETS, QuantizationPlan, Target
from qdm_deploy.errors import InputError, QdmError
from qdm_export.absorb import Absorption, absorb_factors
from qdm_export.passes.attention_layout import AttentionLayout
from qdm_export.passes.bfloat16_attention import LEAST_SCORES, Bfloat16Attention
from qdm_export.passes.bfloat16_kernels import Bfloat16Kernels
from qdm_export.passes.channel_factors import ChannelFactors
from qdm_export.passes.group_norm import GroupNormForm
from qdm_export.passes.half_precision import HalfPrecision
from qdm_export.passes.instance_norm import InstanceNormForm
from qdm_export.passes.joint_heads import JointHeads
from qdm_export.passes.moments_norm import MomentsNormForm
from qdm_export.passes.output_correction import OutputCorrection
from qdm_export.passes.quantize_inputs import QuantizeInputs
from qdm_export.passes.quantize_outputs import QuantizeOutputs
from qdm_export.passes.quantize_weights import QuantizeWeights
from qdm_export.passes.rational_silu import RationalSilu
from qdm_export.passes.step_gains import StepGains
from qdm_export.passes.time_projections import TimeProjections
from qdm_export.passes.upsample_phases import UpsamplePhases
from qdm_export.passes.zero_offsets import ZeroOffsets

__all__ = ["FORMS", "Rest", "TargetForm", "absorb", "emit", "emit_float"]

Rest = Literal["fp16", "bf16", "fp32"]
_TYPES: dict[Rest, ir.DataType] = {
    "fp16": ir.DataType.FLOAT16,
    "bf16": ir.DataType.BFLOAT16,
    "fp32": ir.DataType.FLOAT,
}


@dataclass(frozen=True)
class TargetForm:
    """How a target wants its graph; what is off stays as the exporter has it.

    Attributes:
        unsigned: activation codes are u8, with the zero offset in the zero point.
        quantized_outputs: outputs of convolutions are quantized too.
        half: what is not INT8 has the type ``rest`` of ``emit``.
        norm: rewrites every GroupNormalization.
        packed_weights: codes of 4 bits are stored as INT4.
        joint_heads: attention does not take its heads apart.
        attention_layout: what leads into attention is turned and flattened in an order that moves nothing.
        phases: an upsampling and the convolution behind it become four small convolutions.
        bfloat16_kernels: convolutions that the plan keeps in float, but no shortcuts, multiply bfloat16.
        bfloat16_attention: attention does too where a head has so many scores or more; None for nowhere.
        rational_silu: SiLU as a ratio of polynomials.
        time_projections: what linear layers make of the timestep alone is looked up.
        absorb_k: factors k disappear where they cost nothing.
    """

    unsigned: bool = False
    quantized_outputs: bool = False
    half: bool = False
    norm: type[GroupNormForm] | None = None
    packed_weights: bool = False
    joint_heads: bool = False
    attention_layout: bool = False
    phases: bool = False
    bfloat16_kernels: bool = False
    bfloat16_attention: int | None = None
    rational_silu: bool = False
    time_projections: bool = False
    absorb_k: bool = True


FORMS: dict[Target, TargetForm] = {
    "onnxruntime": TargetForm(
        unsigned=True,
        quantized_outputs=True,
        norm=InstanceNormForm,
        packed_weights=True,
        phases=True,
        time_projections=True,
    ),
    "openvino": TargetForm(
        unsigned=True,
        norm=MomentsNormForm,
        packed_weights=True,
        attention_layout=True,
        phases=True,
        bfloat16_kernels=True,
        bfloat16_attention=LEAST_SCORES,
        rational_silu=True,
        time_projections=True,
    ),
    "tensorrt": TargetForm(half=True, joint_heads=True),
}


def absorb(model: ir.Model, plan: QuantizationPlan, target: Target) -> Absorption:
    """Rewrite a float step graph in place as ``emit`` does first: factors k that cost nothing on ``target``."""
    return _absorb(model, plan, FORMS[target])


def _absorb(model: ir.Model, plan: QuantizationPlan, form: TargetForm) -> Absorption:
    return absorb_factors(model, plan, unsigned=form.unsigned, quantized_outputs=form.quantized_outputs)


def emit(
    graph: ir.Model,
    plan: QuantizationPlan,
    target: Target,
    *,
    rest: Rest = "fp16",
    form: TargetForm | None = None,
) -> ir.Model:
    """A copy of the float step graph that runs ``plan`` in the form of ``target``.

    Args:
        graph: the float step graph.
        plan: what to quantize, with which numbers.
        target: whose form.
        rest: type of what is not INT8, for targets that have it in half precision; "fp32" is for checks of the
            integers alone.
        form: another form than ``FORMS[target]``, for comparisons and for graphs that share a file of weights.

    Raises:
        InputError: an unknown target, or a plan with activations of fewer than 8 bits.
        ExportError: the plan is not of this graph.
    """
    if target not in TARGETS:
        raise InputError(f"target {target!r} is not known; choose one of {', '.join(TARGETS)}")
    form = form or FORMS[target]
    dtype = _TYPES[rest] if form.half else ir.DataType.FLOAT
    model = graph.clone()
    model.graph.name = f"step_{target}"
    if form.absorb_k:
        plan = _absorb(model, plan, form).plan(plan)
    try:
        return ir.passes.Sequential(*_passes(form, plan, dtype))(model).model
    except ir.passes.PassError as error:
        # The sequence wraps what a pass raised; what we raised ourselves already says what to do.
        if isinstance(error.__cause__, QdmError):
            raise error.__cause__ from None
        raise


def _passes(form: TargetForm, plan: QuantizationPlan, dtype: ir.DataType) -> list[ir.passes.PassBase]:
    """What makes the form, in the order in which it builds on each other."""
    passes: list[ir.passes.PassBase | None] = [
        OutputCorrection(plan),
        ChannelFactors(plan, unsigned=form.unsigned),
        StepGains(plan),
        QuantizeWeights(plan, packed=form.packed_weights),
        None if form.unsigned else ZeroOffsets(plan, dtype.numpy()),
        QuantizeInputs(plan, unsigned=form.unsigned),
        QuantizeOutputs(plan) if form.quantized_outputs else None,
        UpsamplePhases(plan) if form.phases else None,
        AttentionLayout() if form.attention_layout else None,
        Bfloat16Kernels(plan) if form.bfloat16_kernels else None,
        None if form.bfloat16_attention is None else Bfloat16Attention(form.bfloat16_attention),
        TimeProjections() if form.time_projections else None,
        None if form.norm is None else form.norm(),
        RationalSilu() if form.rational_silu else None,
        JointHeads() if form.joint_heads else None,
        None if dtype == ir.DataType.FLOAT else HalfPrecision(dtype),
        common.RemoveUnusedNodesPass(),
        common.TopologicalSortPass(),
    ]
    return [each for each in passes if each is not None]


def emit_float(graph: ir.Model) -> ir.Model:
    """A copy of the float step graph as ONNX Runtime runs it fastest: the reference, and what INT8 must beat."""
    model = graph.clone()
    model.graph.name = "step_float"
    return ir.passes.Sequential(InstanceNormForm(), common.RemoveUnusedNodesPass(), common.TopologicalSortPass())(
        model
    ).model
