"""What can be switched in a target's graph, the plan behind it, or the session around it; one at a time."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

import onnx_ir as ir
from lib.case import Case, save_form
from lib.contest import Contender
from lib.sessions import Opening

from qdm_calibration.statistics import collect_statistics
from qdm_deploy.artifacts.plan import LayerPlan, QuantizationPlan, Target
from qdm_deploy.building.engine_audit import audit_row
from qdm_export.check import widened
from qdm_export.passes.bfloat16_attention import Bfloat16Attention
from qdm_export.passes.bfloat16_kernels import Bfloat16Kernels
from qdm_export.passes.channel_factors import ChannelFactors
from qdm_export.passes.half_precision import HalfPrecision
from qdm_export.passes.output_correction import OutputCorrection
from qdm_export.passes.quantize_inputs import QuantizeInputs
from qdm_export.passes.quantize_outputs import QuantizeOutputs
from qdm_export.passes.quantize_weights import QuantizeWeights
from qdm_export.passes.step_gains import StepGains
from qdm_export.passes.zero_offsets import ZeroOffsets
from qdm_export.split_concat import split_checkpoint
from qdm_export.targets import FORMS, Rest, TargetForm, emit
from qdm_export.topology import topology_of

# What a target cannot run without.
_NEEDED = (
    OutputCorrection, ChannelFactors, StepGains, QuantizeWeights, ZeroOffsets, QuantizeInputs, QuantizeOutputs,
    HalfPrecision,
)  # fmt: skip
# Every layer INT8 and nothing corrected: what is compared then is scales alone.
_BARE: dict[str, Any] = {"keep_fp": "none", "output_correction": "none"}


@dataclass(frozen=True)
class Variant:
    """A graph and how it is run.

    Attributes:
        model, plan, target, form, rest: what ``emit`` is given.
        kind: of session, if not the target's own.
        session: its options.
        rows: of a batch; None: what the command line says.
    """

    model: Case
    plan: QuantizationPlan
    target: Target
    form: TargetForm | None = None
    rest: Rest = "fp16"
    kind: str | None = None
    session: Mapping[str, Any] = field(default_factory=dict)
    rows: int | None = None

    def emitted(self) -> ir.Model:
        """The graph."""
        return emit(self.model.graph, self.plan, self.target, form=self.form, rest=self.rest).model


@dataclass(frozen=True)
class Switch:
    """A comparison; the first variant is what the others are compared with."""

    about: str
    targets: tuple[Target, ...]
    variants: Callable[[Case, Target], dict[str, Variant]]


def contenders_of(variants: Mapping[str, Variant], folder: Path, *, mode: str, sm: str) -> dict[str, Contender]:
    """The variants as contenders of a contest, each in a folder of its own.

    ``mode`` is the session's, ``sm`` the compute capability of the engine that counts a `tensorrt` graph's kernels.
    """

    def prepared(label: str, variant: Variant) -> Opening:
        path = save_form(variant.emitted(), folder / label, variant.target)
        if variant.target != "tensorrt":
            return Opening(variant.kind or variant.target, path, {"mode": mode, **variant.session})
        # No CPU runtime compiles bfloat16 between Q and DQ: it gets the same constants in float32 and computes in it.
        path = save_form(widened(path), folder / label / "widened", variant.target)
        return Opening("openvino", path, {"precision": "bf16" if variant.rest == "bf16" else "f32"})

    def kernels(label: str, variant: Variant) -> dict[str, Any]:
        if variant.target != "tensorrt" or find_spec("tensorrt_rtx") is None:
            return {}
        row, _ = audit_row(folder / label / "tensorrt.onnx", variant.plan, backend="tensorrt-rtx", sm=sm)
        return {"planned": row.planned, "INT8": row.int8, **row.kernels}

    def contender(label: str, variant: Variant) -> Contender:
        return Contender(
            lambda: prepared(label, variant),
            timed=variant.target != "tensorrt",
            rows=variant.rows,
            facts=lambda: kernels(label, variant),
        )

    return {label: contender(label, variant) for label, variant in variants.items()}


def _parts(model: Case, target: Target) -> dict[str, Variant]:
    whole, form = Variant(model, model.built(), target), FORMS[target]
    parts = {part.name: form.without(part) for part in form.passes if part not in _NEEDED}
    parts["absorbed factors"] = replace(form, absorb_k=False)
    return {"the whole form": whole} | {f"without {name}": replace(whole, form=left) for name, left in parts.items()}


def _attention(model: Case, target: Target) -> dict[str, Variant]:
    plan = model.built(keep_fp="none")
    limits = {"from 1024 x 1024 scores": 1024**2, "from 256 x 256": 256**2, "all": 1}
    return {"float32": Variant(model, plan, target, FORMS[target].without(Bfloat16Attention))} | {
        f"bfloat16: {label}": Variant(model, plan, target, replace(FORMS[target], least_scores=least))
        for label, least in limits.items()
    }


def _kept(model: Case, target: Target) -> dict[str, Variant]:
    kept = Variant(model, model.built(), target)
    found = {"none kept": Variant(model, model.built(keep_fp="none"), target)}
    in_float32 = replace(kept, form=FORMS[target].without(Bfloat16Kernels))
    return {
        "kept in float32": in_float32,
        "kept in bfloat16": kept,
        "kept and the rest in bfloat16": replace(kept, session={"precision": "bf16"}),
        **found,
    }


def _rest(model: Case, target: Target) -> dict[str, Variant]:
    whole = Variant(model, model.built(), target)
    if target == "openvino":
        return {
            "float32": replace(whole, session={"precision": "f32"}),
            "bfloat16 by the hint alone": replace(whole, kind="openvino, hinted"),
            "bfloat16 but for what is kept": replace(whole, session={"precision": "bf16"}),
        }
    floating = tuple(LayerPlan(layer.layer, "float", "to compare with") for layer in whole.plan.layers)
    nothing = replace(whole, plan=replace(whole.plan, layers=floating, output_correction=None))
    return {
        f"{name}, {rest}": replace(variant, rest=rest)
        for name, variant in (("INT8", whole), ("no INT8", nothing))
        for rest in ("fp16", "bf16")
    }


def split_case(model: Case) -> Case:
    """The same model with its readers of skip concatenations split, measured on the same calibration set."""
    checkpoint, graph = split_checkpoint(model.checkpoint, model.graph)
    topology = topology_of(graph)
    statistics = collect_statistics(
        checkpoint.unet, topology, model.calibration, checkpoint.denoiser.num_train_timesteps
    )
    return replace(model, checkpoint=checkpoint, graph=graph, topology=topology, statistics=statistics)


def _concat(model: Case, target: Target) -> dict[str, Variant]:
    split = split_case(model)
    bare: dict[str, Any] = {**_BARE, "channel_scales": "none", "step_bins": 1}
    return {
        "one scale": Variant(model, model.built(concat_scales="none", **bare), target),
        "a factor for each branch": Variant(model, model.built(concat_scales="branch", **bare), target),
        "split convolutions": Variant(split, split.built(concat_scales="none", **bare), target),
    }


def _channel_factors(model: Case, target: Target) -> dict[str, Variant]:
    plans = {scope: model.built(channel_scales=scope, step_bins=1, **_BARE) for scope in ("none", "free", "auto")}
    apart = replace(FORMS[target], absorb_k=False)
    return {
        "branches alone": Variant(model, plans["none"], target),
        "where they are free": Variant(model, plans["free"], target),
        "on every input": Variant(model, plans["auto"], target),
        "on every input, each a multiply": Variant(model, plans["auto"], target, apart),
    }


def _gains(model: Case, target: Target) -> dict[str, Variant]:
    def static(plan: QuantizationPlan) -> QuantizationPlan:
        return replace(plan, layers=tuple(replace(layer, inverse_r=None) for layer in plan.layers))

    default, eight = model.built(), model.built(step_bins=8)
    return {
        "no gains": Variant(model, static(default), target),
        "the default plan's": Variant(model, default, target),
        "in 8 bins": Variant(model, eight, target),
        "no gains, plan of 8 bins": Variant(model, static(eight), target),
    }


def _part_sizes(model: Case, target: Target) -> dict[str, Variant]:
    alone = Variant(model, model.built(), target, session={"threads": 1, "mode": "latency"})
    return {f"{rows} rows": replace(alone, rows=rows) for rows in (1, 2, 4, 8)}


_CPU: tuple[Target, ...] = ("openvino", "onnxruntime")
_ALL: tuple[Target, ...] = (*_CPU, "tensorrt")
SWITCHES: Mapping[str, Switch] = MappingProxyType(
    {
        "parts": Switch("every part of the target's form left out alone", _ALL, _parts),
        "attention": Switch("attention in bfloat16, by the scores of a head (ADR 17)", ("openvino",), _attention),
        "kept": Switch("layers kept in float32, in bfloat16, or in INT8 after all (ADR 7, 17)", ("openvino",), _kept),
        "rest": Switch("the type of what is not INT8 (ADR 11, 20)", ("openvino", "tensorrt"), _rest),
        "concat": Switch("scales at skip concatenations: one, one for each branch, split convolutions", _ALL, _concat),
        "channel-factors": Switch("factors per input channel, by where they are allowed", _ALL, _channel_factors),
        "gains": Switch("step gains (ADR 6)", _ALL, _gains),
        "part-sizes": Switch("rows of a part, on one thread (ADR 14)", _CPU, _part_sizes),
    }
)  # fmt: skip
