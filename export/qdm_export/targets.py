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

A form is the list of passes that make it. Each rewriting is counted: what it did is held against what the float graph
promises, and a place that was missed fails the emission (``rewrites``).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import onnx_ir as ir
from onnx_ir.passes import common

from qdm_deploy.artifacts.plan import TARGETS, QuantizationPlan, Target
from qdm_deploy.errors import InputError
from qdm_export.absorb import Absorption, absorb_factors
from qdm_export.passes.attention_layout import AttentionInput, AttentionLayout
from qdm_export.passes.base import GraphPass, Rewritten, Settings
from qdm_export.passes.bfloat16_attention import LEAST_SCORES, Bfloat16Attention
from qdm_export.passes.bfloat16_kernels import Bfloat16Kernels
from qdm_export.passes.centred_projections import CentredProjections
from qdm_export.passes.channel_factors import ChannelFactors
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
from qdm_export.rewrites import Rewrite, refuse_missed

__all__ = ["FORMS", "Emission", "Rest", "TargetForm", "absorb", "emit", "emit_float"]

Rest = Literal["fp16", "bf16", "fp32"]
_TYPES: dict[Rest, ir.DataType] = {
    "fp16": ir.DataType.FLOAT16,
    "bf16": ir.DataType.BFLOAT16,
    "fp32": ir.DataType.FLOAT,
}


@dataclass(frozen=True)
class TargetForm:
    """How a target wants its graph: the passes that make it, and what they are told.

    A comparison leaves single parts out: ``FORMS["openvino"].without(RationalSilu)``.

    Attributes:
        passes: in the order in which they build on each other. What none of them does stays as the exporter has it.
        unsigned: activation codes are u8, with the zero offset in the zero point; otherwise s8.
        half: what is not INT8 has the type ``rest`` of ``emit``; otherwise float32.
        packed_weights: codes of 4 bits are stored as INT4.
        least_scores: from how many scores of a head on attention multiplies bfloat16.
        absorb_k: factors k disappear where they cost nothing.
    """

    passes: tuple[type[GraphPass], ...]
    unsigned: bool = False
    half: bool = False
    packed_weights: bool = False
    least_scores: int = LEAST_SCORES
    absorb_k: bool = True

    @property
    def quantized_outputs(self) -> bool:
        """Whether outputs of INT8 convolutions are quantized too."""
        return QuantizeOutputs in self.passes

    def without(self, *left_out: type[GraphPass]) -> "TargetForm":
        """The same form without some of its passes.

        Raises:
            ValueError: a pass is not part of the form.
        """
        unknown = [each.__name__ for each in left_out if each not in self.passes]
        if unknown:
            raise ValueError(f"{', '.join(unknown)} is no part of this form, and cannot be left out")
        return replace(self, passes=tuple(each for each in self.passes if each not in left_out))


_SCALES = (OutputCorrection, ChannelFactors, StepGains)

FORMS: dict[Target, TargetForm] = {
    "onnxruntime": TargetForm(
        passes=(
            *_SCALES,
            QuantizeWeights,
            QuantizeInputs,
            QuantizeOutputs,
            UpsamplePhases,
            CentredProjections,
            TimeProjections,
            InstanceNormForm,
        ),
        unsigned=True,
        packed_weights=True,
    ),
    "openvino": TargetForm(
        passes=(
            *_SCALES,
            QuantizeWeights,
            QuantizeInputs,
            UpsamplePhases,
            AttentionInput,
            AttentionLayout,
            Bfloat16Kernels,
            Bfloat16Attention,
            CentredProjections,
            TimeProjections,
            MomentsNormForm,
            RationalSilu,
        ),
        unsigned=True,
        packed_weights=True,
    ),
    "tensorrt": TargetForm(
        passes=(
            *_SCALES,
            QuantizeWeights,
            ZeroOffsets,
            QuantizeInputs,
            JointHeads,
            HalfPrecision,
        ),
        half=True,
    ),
}


@dataclass(frozen=True)
class Emission:
    """A target's graph and what was done for it.

    Attributes:
        model: the graph.
        rewrites: one for each pass that had something to do, in order.
    """

    model: ir.Model
    rewrites: tuple[Rewrite, ...]


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
    allow_missed: bool = False,
) -> Emission:
    """A copy of the float step graph that runs ``plan`` in the form of ``target``, and the count of every rewriting.

    Args:
        graph: the float step graph.
        plan: what to quantize, with which numbers.
        target: whose form.
        rest: type of what is not INT8, for targets that have it in half precision; "fp32" is for checks of the
            integers alone.
        form: another form than ``FORMS[target]``, for comparisons and for graphs that share a file of weights.
        allow_missed: emit the graph although a rewriting misses a place that the float graph promises.

    Raises:
        InputError: an unknown target.
        ExportError: the plan is not of this graph, or a rewriting missed a place.
    """
    if target not in TARGETS:
        raise InputError(f"target {target!r} is not known; choose one of {', '.join(TARGETS)}")
    form = form or FORMS[target]
    dtype = _TYPES[rest] if form.half else ir.DataType.FLOAT
    model = graph.clone()
    model.graph.name = f"step_{target}"
    absorption = _absorb(model, plan, form) if form.absorb_k else Absorption()
    plan = absorption.plan(plan)
    settings = Settings(plan, form.unsigned, form.packed_weights, dtype, form.least_scores)
    chosen = [each for each in form.passes if each is not HalfPrecision or dtype != ir.DataType.FLOAT]
    rewrites = (*absorption.rewrites, *_run(model, [each.made(settings) for each in chosen]))
    if not allow_missed:
        refuse_missed(target, rewrites)
    return Emission(model, rewrites)


def _run(model: ir.Model, passes: Sequence[GraphPass]) -> tuple[Rewrite, ...]:
    """Run passes, and count. What they promise is read from the graph before any of them changes it."""
    promised = [each.promised(model) for each in passes]
    rewrites = []
    for each, places in zip(passes, promised, strict=True):
        result = each(model)
        if isinstance(result, Rewritten):
            rewrites.append(Rewrite.of(each.name, places, result.found))
    ir.passes.Sequential(common.RemoveUnusedNodesPass(), common.TopologicalSortPass())(model)
    return tuple(rewrite for rewrite in rewrites if rewrite.done or rewrite.expected or rewrite.left)


def emit_float(graph: ir.Model, *, allow_missed: bool = False) -> Emission:
    """A copy of the float step graph as ONNX Runtime runs it fastest: the reference, and what INT8 must beat.

    Raises:
        ExportError: a norm has another form than expected, and ``allow_missed`` is off.
    """
    model = graph.clone()
    model.graph.name = "step_float"
    rewrites = _run(model, [InstanceNormForm()])
    if not allow_missed:
        refuse_missed("float", rewrites)
    return Emission(model, rewrites)
