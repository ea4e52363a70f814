"""The graphs that the GPU suite compares, emitted from a bundle's plan or from plans made for it."""

import dataclasses
from pathlib import Path

import onnx_ir as ir

from qdm_deploy.artifacts.bundle import Bundle
from qdm_deploy.artifacts.plan import LayerPlan, QuantizationPlan

__all__ = ["calibrated_graphs", "forms_of_plan", "plan_graphs", "without_layers"]


def without_layers(plan: QuantizationPlan) -> QuantizationPlan:
    """The plan with nothing quantized: what ``emit`` makes of it is the target's float graph."""
    floating = tuple(LayerPlan(layer.layer, "float", "a float engine") for layer in plan.layers)
    return dataclasses.replace(plan, layers=floating)


def forms_of_plan(graph: ir.Model, plan: QuantizationPlan) -> dict[str, tuple[ir.Model, QuantizationPlan]]:
    """Forms of the tensorrt graph that differ in one thing from "as emitted", by name, with the plan of each."""
    from qdm_export.passes.joint_heads import JointHeads
    from qdm_export.targets import FORMS, emit

    static = dataclasses.replace(
        plan, layers=tuple(dataclasses.replace(layer, inverse_r=None) for layer in plan.layers)
    )
    nothing, apart = without_layers(plan), FORMS["tensorrt"].without(JointHeads)
    return {
        "as emitted": (emit(graph, plan, "tensorrt").model, plan),
        "heads apart": (emit(graph, plan, "tensorrt", form=apart).model, plan),
        "no step gains": (emit(graph, static, "tensorrt").model, static),
        "float16": (emit(graph, nothing, "tensorrt").model, nothing),
        "float16, heads apart": (emit(graph, nothing, "tensorrt", form=apart).model, nothing),
    }


def plan_graphs(bundle: Bundle, folder: Path) -> dict[str, Path]:
    """Those forms of a bundle of the embedded model, on disk."""
    from lib.bench import save_form

    from qdm_deploy.building.bundle_from_checkpoint import EMBEDDED_MODEL
    from qdm_export.float_graph import export_float_graph
    from qdm_export.unet import load_checkpoint

    plan = QuantizationPlan.load(bundle.file("unet/plan.json").parent)
    forms = forms_of_plan(export_float_graph(load_checkpoint(EMBEDDED_MODEL)), plan)
    return {name: save_form(model, folder / name.replace(" ", "_")) for name, (model, _) in forms.items()}


def calibrated_graphs(folder: Path) -> dict[str, Path]:
    """The embedded model planned anew: the forms of scales at skip concatenations, and step gains in eight bins.

    The default plan of the embedded model has no step gains, so what they cost shows here, beside "concat branch".
    """
    from concat_forms import split_case
    from lib.bench import case, write_graph

    model = case("fashion", samples=4)
    plans = {
        "concat none": (model, model.built(concat_scales="none")),
        "concat branch": (model, model.built(concat_scales="branch")),
    }
    plans["step gains, 8 bins"] = (model, model.built(concat_scales="branch", step_bins=8))
    split = split_case(model)
    plans["concat split"] = (split, split.built(concat_scales="none"))
    return {
        name: write_graph(of, plan, "tensorrt", folder / name.replace(" ", "_")) for name, (of, plan) in plans.items()
    }
