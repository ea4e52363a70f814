"""What each factor of the plan is worth, on the embedded model: every feature on and off, on every target.

`onnxruntime` and `openvino` run their own graphs; `tensorrt` runs the simulation of its integers. Teacher-forced SQNR
of the network's output (mean over the steps, and at the last step), PSNR of the finished images, unseen seeds.

    python benchmarks/ablation.py --save
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import Any

from lib.bench import FIRST_SEED, Case, case, finish, parser, say, write_float, write_graph
from qdm_deploy.components.conditioning import conditioning_of

from qdm_calibration.simulate import simulate
from qdm_deploy.artifacts.plan import TARGETS, QuantizationPlan, Target
from qdm_deploy.backends import OnnxRuntimeSession, OpenVinoSession
from qdm_deploy.building.quality import compare_with, reference_run
from qdm_deploy.building.simulation import TorchSession
from qdm_deploy.report.model import QualityRow
from qdm_deploy.runtime import StepSession
from qdm_deploy.samplers import step_table
from qdm_export.step_graph import StepGraph

PLAIN: dict[str, Any] = {
    "ranges": "minmax", "zero_offset": False, "concat_scales": "none", "channel_scales": "none", "step_bins": 1,
    "keep_fp": "none", "output_correction": "none", "upsample_phases": False,
}  # fmt: skip
# What came before the last step to the default.
_BEFORE = {"output_correction": "none"}
FULL: dict[str, Any] = {}
# What each row asks of `build`; what it does not name has build's default.
VARIANTS: dict[str, dict[str, Any]] = {
    "symmetric min-max": PLAIN,
    "symmetric, Lp 2.4 range": {**PLAIN, "ranges": "lp"},
    "+ zero offset z": {
        "concat_scales": "none",
        "channel_scales": "none",
        "step_bins": 1,
        "keep_fp": "none",
        **_BEFORE,
    },
    "+ free factors k": {"step_bins": 1, "keep_fp": "none", **_BEFORE},
    "+ few layers in float": _BEFORE,
    "+ output correction (default)": FULL,
    "default without z": {"zero_offset": False},
    "default without k": {"concat_scales": "none", "channel_scales": "none"},
    "default, only branch factors": {"channel_scales": "none"},
    "default, k on every input": {"channel_scales": "auto"},
    "default, 4 step bins": {"step_bins": 4},
    "default, min-max range": {"ranges": "minmax"},
    "default, MSE range": {"ranges": "mse"},
    "default + bias correction": {"bias_correction": "auto"},
    "default, 10 % of the cost in float": {"keep_fp": "10%"},
    "default, upsampling whole": {"upsample_phases": False},
}


def session_for(model: Case, plan: QuantizationPlan, target: Target, folder: Path) -> tuple[str, StepSession]:
    """What runs a target in this benchmark."""
    if target == "tensorrt":
        step = StepGraph(simulate(model.checkpoint.unet, plan, target), model.checkpoint.spec).eval()
        return "simulation", TorchSession(step, target)
    path = write_graph(model, plan, target, folder)
    return target, OnnxRuntimeSession(path) if target == "onnxruntime" else OpenVinoSession(path, precision="f32")


def measured(name: str, plan: QuantizationPlan, row: QualityRow) -> dict[str, Any]:
    """One line of the table, of one calibration seed."""
    summary = plan.summary()
    return {
        "plan": name,
        "target": row.label,
        "eps SQNR dB": row.eps_sqnr_mean_db,
        "last step": row.eps_sqnr_db[-1],
        "PSNR dB": row.psnr_mean_db,
        "worst PSNR": row.psnr_min_db,
        "float": summary["float"],
        "z": summary["zero_offset"],
        "k": summary["branch_factors"],
        "r": summary["step_gains"],
    }


def medians(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One line for all calibration seeds: the median of every number, and how far the SQNR spreads."""
    sqnr = [row["eps SQNR dB"] for row in rows]
    middle = {
        key: median(row[key] for row in rows) if not isinstance(value, str) else value for key, value in rows[0].items()
    }
    return {**middle, "lowest": min(sqnr), "highest": max(sqnr)}


def main() -> None:
    arguments = parser("Ablation of the quantization plan on the embedded model.")
    arguments.add_argument("--seeds", type=int, default=64)
    arguments.add_argument("--steps", type=int, default=20)
    arguments.add_argument("--calibration-samples", type=int, default=16)
    arguments.add_argument("--calibration-seeds", default="0,1,2")
    arguments.add_argument("--targets", default=",".join(TARGETS))
    arguments.add_argument("--headline", action="store_true", help="only symmetric min-max and the default")
    arguments.add_argument("--cache", type=Path, help="folder of finished rows, to go on from after an interruption")
    given = arguments.parse_args()
    names = [name for name, options in VARIANTS.items() if not given.headline or options in (PLAIN, FULL)]
    targets = [target for target in TARGETS if target in given.targets.split(",")]
    found: dict[tuple[str, Target], list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for seed in map(int, given.calibration_seeds.split(",")):
            for name, target, row in _rows(given, seed, names, targets, Path(scratch)):
                found.setdefault((name, target), []).append(row)
    rows = [medians(found[name, target]) for target in targets for name in names]
    plain = {row["target"]: row["eps SQNR dB"] for row in rows if row["plan"] == "symmetric min-max"}
    for row in rows:
        row["over plain"] = row["eps SQNR dB"] - plain[row["target"]]
    columns = ["plan", "target", "eps SQNR dB", "over plain", "lowest", "highest", "last step", "PSNR dB", "worst PSNR"]
    extra = {
        "seeds": given.seeds,
        "steps": given.steps,
        "sampler": "ddim",
        "calibration_samples": given.calibration_samples,
        "calibration_seeds": given.calibration_seeds,
    }
    columns += ["float", "z", "k", "r"]
    finish("headline" if given.headline else "ablation", columns, rows, extra, save=given.save)


def _rows(
    given: argparse.Namespace, seed: int, names: Sequence[str], targets: Sequence[Target], scratch: Path
) -> Iterator[tuple[str, Target, dict[str, Any]]]:
    """Every plan and target under one calibration seed; different seeds share no trajectory."""
    model = case("fashion", samples=given.calibration_samples, seed=seed << 20)
    spec, table = model.checkpoint.spec, step_table(model.schedule, "ddim", given.steps)
    seeds = range(FIRST_SEED, FIRST_SEED + given.seeds)
    weights = model.checkpoint.weights_sha256[:12]
    with OnnxRuntimeSession(write_float(model, scratch / "float")) as session:
        say("float reference")
        reference = reference_run(session, table, seeds, spec, conditioning=conditioning_of(spec, given.seeds))
    for name in names:
        plan: QuantizationPlan | None = None
        options = sha256(json.dumps(VARIANTS[name], sort_keys=True).encode()).hexdigest()[:12]
        for target in targets:
            key = f"{weights}-{options}-{target}-{seed}-{given.calibration_samples}-{given.seeds}x{given.steps}"
            cached = given.cache and given.cache / f"{key}.json"
            if cached and cached.is_file():
                yield name, target, json.loads(cached.read_text())
                continue
            plan = plan or model.built(**VARIANTS[name])
            backend, opened = session_for(model, plan, target, scratch / key)
            with opened as session:
                row, _ = compare_with(reference, session, spec, target=target, backend=backend)
            line = measured(name, plan, row)
            if cached:
                given.cache.mkdir(parents=True, exist_ok=True)
                cached.write_text(json.dumps(line))
            say(
                f"{name} | {row.label}, seed {seed}: {row.eps_sqnr_mean_db:.2f} dB, last {row.eps_sqnr_db[-1]:.2f} dB, "
                f"PSNR {row.psnr_mean_db:.2f} dB, {line['float']} layers float"
            )
            yield name, target, line


if __name__ == "__main__":
    main()
