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
between very many positions (docs/adr/0017).

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
from qdm_export.passes.bfloat16_attention import Bfloat16Attention
from qdm_export.passes.bfloat16_kernels import Bfloat16Kernels
from qdm_export.passes.bias_corrections import BiasCorrections
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
from qdm_export.passes.step_gains import StepGains
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
    """How a target wants its graph."""

    unsigned: bool
    quantized_outputs: bool
    half: bool
    norm: type[GroupNormForm] | None
    packed_weights: bool
    joint_heads: bool
    phases: bool
    bfloat16_kernels: bool


FORMS: dict[Target, TargetForm] = {
    "onnxruntime": TargetForm(
        unsigned=True,
        quantized_outputs=True,
        half=False,
        norm=InstanceNormForm,
        packed_weights=True,
        joint_heads=False,
        phases=True,
        bfloat16_kernels=False,
    ),
    "openvino": TargetForm(
        unsigned=True,
        quantized_outputs=False,
        half=False,
        norm=MomentsNormForm,
        packed_weights=True,
        joint_heads=False,
        phases=True,
        bfloat16_kernels=True,
    ),
    "tensorrt": TargetForm(
        unsigned=False,
        quantized_outputs=False,
        half=True,
        norm=None,
        packed_weights=False,
        joint_heads=True,
        phases=False,
        bfloat16_kernels=False,
    ),
}


def absorb(model: ir.Model, plan: QuantizationPlan, target: Target) -> Absorption:
    """Rewrite a float step graph in place as ``emit`` does first: factors k that cost nothing on ``target``."""
    form = FORMS[target]
    return absorb_factors(model, plan, unsigned=form.unsigned, quantized_outputs=form.quantized_outputs)


def emit(
    graph: ir.Model,
    plan: QuantizationPlan,
    target: Target,
    *,
    rest: Rest = "fp16",
    absorb_k: bool = True,
    packed_weights: bool = True,
    joint_heads: bool = True,
    norms: bool = True,
    phases: bool = True,
    bfloat16_kernels: bool = True,
) -> ir.Model:
    """A copy of the float step graph that runs ``plan`` in the form of ``target``.

    Args:
        graph: the float step graph.
        plan: what to quantize, with which numbers.
        target: whose form.
        rest: type of what is not INT8, for targets that have it in half precision; "fp32" is for checks of the
            integers alone.
        absorb_k: off leaves every factor k where the plan has it, for comparisons.
        packed_weights: off stores codes of 4 bits as INT8 where the target takes INT4 too: graphs that share a file
            with one that does not would otherwise store both.
        joint_heads: off takes attention apart into heads as the exporter does, for comparisons.
        norms: off leaves every GroupNormalization as the exporter has it, for comparisons.
        phases: off leaves every upsampling and the convolution behind it as the exporter has them, for comparisons.
        bfloat16_kernels: off leaves large attention and convolutions that the plan keeps in float in float32 where the
            target multiplies them in bfloat16, for comparisons.

    Raises:
        InputError: an unknown target, or a plan with activations of fewer than 8 bits.
        ExportError: the plan is not of this graph.
    """
    if target not in TARGETS:
        raise InputError(f"target {target!r} is not known; choose one of {', '.join(TARGETS)}")
    _refuse_simulated_only(plan)
    form = FORMS[target]
    dtype = _TYPES[rest] if form.half else ir.DataType.FLOAT
    model = graph.clone()
    model.graph.name = f"step_{target}"
    if absorb_k:
        plan = absorb(model, plan, target).plan(plan)
    passes: list[ir.passes.PassBase] = [
        BiasCorrections(plan),
        OutputCorrection(plan),
        ChannelFactors(plan, unsigned=form.unsigned),
        StepGains(plan),
        QuantizeWeights(plan, packed=packed_weights and form.packed_weights),
    ]
    if not form.unsigned:
        passes.append(ZeroOffsets(plan, dtype.numpy()))
    passes.append(QuantizeInputs(plan, unsigned=form.unsigned))
    if form.quantized_outputs:
        passes.append(QuantizeOutputs(plan))
    if form.phases and phases:
        passes.append(UpsamplePhases(plan))
    if form.bfloat16_kernels and bfloat16_kernels:
        passes += [Bfloat16Kernels(plan), Bfloat16Attention()]
    if form.norm is not None and norms:
        passes.append(form.norm())
    if form.joint_heads and joint_heads:
        passes.append(JointHeads())
    if dtype != ir.DataType.FLOAT:
        passes.append(HalfPrecision(dtype))
    passes += [common.RemoveUnusedNodesPass(), common.TopologicalSortPass()]
    try:
        return ir.passes.Sequential(*passes)(model).model
    except ir.passes.PassError as error:
        # The sequence wraps what a pass raised; what we raised ourselves already says what to do.
        if isinstance(error.__cause__, QdmError):
            raise error.__cause__ from None
        raise


def _refuse_simulated_only(plan: QuantizationPlan) -> None:
    narrow = [layer for layer in plan.quantized if layer.activation_bits != 8]
    if narrow:
        raise InputError(
            f"{len(narrow)} layers of the plan have activations of {narrow[0].activation_bits} bits, which are "
            "simulated only; plan with 8 to emit a graph"
        )


def emit_float(graph: ir.Model) -> ir.Model:
    """A copy of the float step graph as ONNX Runtime runs it fastest: the reference, and what INT8 must beat."""
    model = graph.clone()
    model.graph.name = "step_float"
    return ir.passes.Sequential(InstanceNormForm(), common.RemoveUnusedNodesPass(), common.TopologicalSortPass())(
        model
    ).model
