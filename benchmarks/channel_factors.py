"""Factors k per input channel on the target `tensorrt`: what they gain, and the kernels that they cost there.

Quality is the teacher-forced SQNR of the network's output in the simulation of the target's integers; kernels are those
of the TensorRT-RTX engine (built without a GPU), where that module is installed. A factor that nothing takes up is a
multiply before the quantize: behind GroupNorm and SiLU it parts the kernel that these three are otherwise, so the cost
predicted is one more pass (a read and a write of float16) over each such input.

    python benchmarks/channel_factors.py --save
"""

import json
import tempfile
from collections.abc import Collection
from dataclasses import replace
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

import onnx_ir as ir
from lib.bench import FIRST_SEED, Case, case, finish, parser, say, write_float

from qdm_calibration.channel_factors import free_inputs, search_channel_factors
from qdm_calibration.plan import PlanOptions, make_plan
from qdm_calibration.simulate import simulate
from qdm_calibration.statistics import collect_scaled_inputs
from qdm_deploy.artifacts.plan import TARGETS, QuantizationPlan
from qdm_deploy.backends import OnnxRuntimeSession
from qdm_deploy.building.engine_audit import audit_row
from qdm_deploy.building.quality import ReferenceRun, compare_with, reference_run
from qdm_deploy.building.simulation import TorchSession
from qdm_deploy.components.conditioning import conditioning_of
from qdm_deploy.samplers import step_table
from qdm_export.shared_weights import save_with_shared_weights
from qdm_export.step_graph import StepGraph
from qdm_export.targets import FORMS, emit

# Name of the variant: the inputs that are offered factors, and whether constants take up what they can.
VARIANTS = {
    "none": ("none", True),
    "absorbed": ("absorbed", True),
    "free": ("free", True),
    "auto": ("auto", True),
    "auto, each a multiply": ("auto", False),
}


def offered(model: Case, scope: str) -> Collection[str] | None:
    """The inputs that may have factors per channel; None: all."""
    if scope == "auto":
        return None
    if scope == "free":
        return free_inputs(model.topology, TARGETS)
    return {name for name, layers in model.topology.groups().items() if layers[0].absorber is not None}


def plan_with(model: Case, scope: str) -> QuantizationPlan:
    """The plan with the factors of a scope."""
    if scope == "none":
        return model.plan()
    unet = model.checkpoint.unet
    factors = search_channel_factors(
        unet, model.topology, model.statistics, model.calibration, channels=offered(model, scope)
    )
    inverse_k = {name: found.inverse_k for name, found in factors.items() if found.inverse_k is not None}
    scaled = collect_scaled_inputs(unet, model.topology, model.calibration, model.statistics.timestep_edges, inverse_k)
    statistics = replace(model.statistics, inputs={**model.statistics.inputs, **scaled})
    return make_plan(unet, model.topology, statistics, PlanOptions(), factors=factors)


def multiplied(graph: ir.Model, plan: QuantizationPlan) -> tuple[int, float]:
    """Factors left as a multiply, and KiB per sample of the passes predicted for them."""
    left = [node for node in graph.graph if node.name is not None and node.name.endswith("/scale_channels")]
    total = 0
    for node in left:
        shape = node.outputs[0].shape
        if shape is not None and plan.layer(str(node.name).rpartition("/")[0]).layer.normalized:
            total += 2 * 2 * prod(size for size in list(shape)[1:] if isinstance(size, int))
    return len(left), total / 1024


def quality(model: Case, plan: QuantizationPlan, reference: ReferenceRun) -> dict[str, Any]:
    """Of the simulation of the target."""
    step = StepGraph(simulate(model.checkpoint.unet, plan, "tensorrt"), model.checkpoint.spec).eval()
    with TorchSession(step, "tensorrt") as session:
        row, _ = compare_with(reference, session, model.checkpoint.spec, target="tensorrt", backend="simulation")
    return {"eps SQNR dB": row.eps_sqnr_mean_db, "last step": row.eps_sqnr_db[-1], "PSNR dB": row.psnr_mean_db}


def main() -> None:
    arguments = parser("Factors per input channel on TensorRT: quality and kernels, on the embedded model.")
    arguments.add_argument("--seeds", type=int, default=64)
    arguments.add_argument("--steps", type=int, default=50)
    arguments.add_argument("--calibration-samples", type=int, default=16)
    arguments.add_argument("--sm", default="8.9", help="compute capabilities, separated by commas")
    arguments.add_argument("--cache", type=Path, help="folder of finished rows, to go on from after an interruption")
    given = arguments.parse_args()
    model = case("fashion", samples=given.calibration_samples)
    table = step_table(model.schedule, "ddim", given.steps)
    seeds = range(FIRST_SEED, FIRST_SEED + given.seeds)
    spec = model.checkpoint.spec
    rows: dict[str, dict[str, Any]] = {}
    plans: dict[str, QuantizationPlan] = {}  # absorbing changes the graph, not the plan
    measured: dict[str, dict[str, Any]] = {}
    reference: ReferenceRun | None = None
    with tempfile.TemporaryDirectory() as scratch:
        for number, (name, (scope, absorb_k)) in enumerate(VARIANTS.items()):
            size = f"{model.checkpoint.weights_sha256[:12]}-{given.seeds}x{given.steps}-{given.calibration_samples}"
            cached = given.cache and given.cache / f"{number}-{size}-sm{given.sm}.json"
            if cached and cached.is_file():
                rows[name] = json.loads(cached.read_text())
                measured[scope] = {key: rows[name][key] for key in ("eps SQNR dB", "last step", "PSNR dB")}
                continue
            say(name)
            if reference is None:
                with OnnxRuntimeSession(write_float(model, Path(scratch) / "float")) as session:
                    reference = reference_run(
                        session, table, seeds, spec, conditioning=conditioning_of(spec, given.seeds)
                    )
            plan = plans[scope] = plans.get(scope) or plan_with(model, scope)
            if scope not in measured:
                measured[scope] = quality(model, plan, reference)
            graph = emit(model.graph, plan, "tensorrt", form=replace(FORMS["tensorrt"], absorb_k=absorb_k)).model
            left, extra = multiplied(graph, plan)
            rows[name] = {"k": name, **measured[scope], "factors": plan.summary()["branch_factors"]}
            rows[name] |= {"multiplies": left, "extra KiB": extra}
            path = Path(scratch) / str(number) / "tensorrt.onnx"
            path.parent.mkdir()
            save_with_shared_weights([(path, graph)], path.with_name("weights.bin"))
            if find_spec("tensorrt_rtx") is not None:
                for sm in given.sm.split(","):
                    engine, _ = audit_row(path, plan, backend="tensorrt-rtx", sm=sm)
                    kernels = engine.kernels
                    rows[name] |= {f"int8 {sm}": engine.int8, f"kernels {sm}": kernels["kernels"]}
                    rows[name] |= {f"generated {sm}": kernels["generated"], f"all {sm}": dict(kernels)}
            if cached:
                given.cache.mkdir(parents=True, exist_ok=True)
                cached.write_text(json.dumps(rows[name]))
    columns = [key for key in dict.fromkeys(key for row in rows.values() for key in row) if not key.startswith("all ")]
    extra_facts = {key: value for key, value in vars(given).items() if key not in ("save", "cache")}
    finish("channel-factors", columns, list(rows.values()), extra_facts, save=given.save)


if __name__ == "__main__":
    main()
