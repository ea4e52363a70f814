"""What each factor of the plan is worth, on the embedded model: every feature on and off, on every target.

`onnxruntime` and `openvino` run their own graphs; `tensorrt` runs the simulation of its integers. Teacher-forced SQNR
of the network's output (mean over the steps, and at the last step), PSNR of the finished images, unseen seeds.

    python benchmarks/ablation.py --save
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from bench import Case, case, finish, parser, say, write_float, write_graph

from qdm_calibration.plan import PlanOptions
from qdm_calibration.simulate import simulate
from qdm_deploy.artifacts.plan import TARGETS, QuantizationPlan, Target
from qdm_deploy.pipeline.conditioning import conditioning_of
from qdm_deploy.pipeline.quality import compare_with, reference_run
from qdm_deploy.pipeline.simulation import TorchSession
from qdm_deploy.report.model import QualityRow
from qdm_deploy.runtime import OnnxRuntimeSession, OpenVinoSession, StepSession
from qdm_deploy.samplers import step_table
from qdm_export.step_graph import StepGraph

PLAIN = PlanOptions(ranges="minmax", zero_offset=False, concat_scales="none", step_bins=1)
FULL = PlanOptions()
VARIANTS = {
    "symmetric min-max": PLAIN,
    "symmetric, MSE range": PlanOptions(zero_offset=False, concat_scales="none", step_bins=1),
    "+ zero offset z": PlanOptions(concat_scales="none", step_bins=1),
    "+ branch factors k": PlanOptions(step_bins=1),
    "+ step gains r (default)": FULL,
    "default without z": PlanOptions(zero_offset=False),
    "default without k": PlanOptions(concat_scales="none"),
    "default, min-max range": PlanOptions(ranges="minmax"),
    "default, Lp 2.4 range": PlanOptions(ranges="lp"),
    "default, gains from 5 % on": PlanOptions(gain_ratio=1.05),
}
# Seeds that no calibration uses.
FIRST_SEED = 2**40


def session_for(model: Case, plan: QuantizationPlan, target: Target, folder: Path) -> tuple[str, StepSession]:
    """What runs a target in this benchmark."""
    if target == "tensorrt":
        step = StepGraph(simulate(model.checkpoint.unet, plan, target), model.checkpoint.spec).eval()
        return "simulation", TorchSession(step, target)
    path = write_graph(model, plan, target, folder)
    return target, OnnxRuntimeSession(path) if target == "onnxruntime" else OpenVinoSession(path, precision="f32")


def measured(name: str, plan: QuantizationPlan, row: QualityRow) -> dict[str, Any]:
    """One line of the table."""
    summary = plan.summary()
    return {
        "plan": name,
        "target": row.label,
        "eps SQNR dB": row.eps_sqnr_mean_db,
        "last step": row.eps_sqnr_db[-1],
        "PSNR dB": row.psnr_mean_db,
        "worst PSNR": row.psnr_min_db,
        "z": summary["zero_offset"],
        "k": summary["branch_factors"],
        "r": summary["step_gains"],
    }


def main() -> None:
    arguments = parser("Ablation of the quantization plan on the embedded model.")
    arguments.add_argument("--seeds", type=int, default=64)
    arguments.add_argument("--steps", type=int, default=50)
    arguments.add_argument("--calibration-samples", type=int, default=16)
    arguments.add_argument("--targets", default=",".join(TARGETS))
    arguments.add_argument("--headline", action="store_true", help="only symmetric min-max and the default")
    arguments.add_argument("--cache", type=Path, help="folder of finished rows, to go on from after an interruption")
    given = arguments.parse_args()
    model = case("fashion", samples=given.calibration_samples)
    spec = model.checkpoint.spec
    table = step_table(model.schedule, "ddim", given.steps)
    seeds = range(FIRST_SEED, FIRST_SEED + given.seeds)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        with OnnxRuntimeSession(write_float(model, Path(scratch) / "float")) as session:
            say("float reference")
            reference = reference_run(session, table, seeds, spec, conditioning=conditioning_of(spec, given.seeds))
        for number, name in enumerate(sorted(VARIANTS, key=lambda name: VARIANTS[name] not in (PLAIN, FULL))):
            if given.headline and VARIANTS[name] not in (PLAIN, FULL):
                continue
            plan = model.plan(VARIANTS[name])
            for target in (target for target in TARGETS if target in given.targets.split(",")):
                cached = given.cache and given.cache / f"{number}-{target}-{given.seeds}x{given.steps}.json"
                if cached and cached.is_file():
                    rows.append(json.loads(cached.read_text()))
                    continue
                backend, opened = session_for(model, plan, target, Path(scratch) / str(number))
                with opened as session:
                    row, _ = compare_with(reference, session, spec, target=target, backend=backend)
                rows.append(measured(name, plan, row))
                if cached:
                    given.cache.mkdir(parents=True, exist_ok=True)
                    cached.write_text(json.dumps(rows[-1]))
                say(f"{name} | {row.label}: {row.eps_sqnr_mean_db:.2f} dB, PSNR {row.psnr_mean_db:.2f} dB")
    plain = {row["target"]: row["eps SQNR dB"] for row in rows if row["plan"] == "symmetric min-max"}
    for row in rows:
        row["over plain"] = row["eps SQNR dB"] - plain[row["target"]]
    rows.sort(key=lambda row: (row["target"], list(VARIANTS).index(row["plan"])))
    columns = ["plan", "target", "eps SQNR dB", "over plain", "last step", "PSNR dB", "worst PSNR", "z", "k", "r"]
    extra = {
        "seeds": given.seeds,
        "steps": given.steps,
        "sampler": "ddim",
        "calibration_samples": given.calibration_samples,
    }
    finish("headline" if given.headline else "ablation", columns, rows, extra, save=given.save)


if __name__ == "__main__":
    main()
