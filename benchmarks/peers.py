"""What other quantizers make of the embedded model: ModelOpt and ONNX Runtime beside our plans.

Same calibration rows, same unseen seeds. ModelOpt computes as it does itself: its own fake-quantized network, with all
its layers. ONNX Runtime's `quantize_static` gets the float step graph, and what has a weight or is a matrix product is
quantized; the arithmetic of the sampler stays float. Ours are the graphs of the target onnxruntime. Teacher-forced SQNR
of the network's output (mean over the steps, and at the last step), PSNR of the finished images.

    pip install 'qdm-deploy[build,modelopt]'
    python benchmarks/peers.py --save
"""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ablation import FIRST_SEED, FULL, PLAIN
from bench import Case, case, finish, parser, say, write_float, write_graph
from peer_models import CALIBRATION_STEPS, CalibrationMethod, modelopt_session, quantized_static

from qdm_deploy.pipeline.quality import compare_with, reference_run
from qdm_deploy.runtime import OnnxRuntimeSession, StepSession
from qdm_deploy.runtime.conditioning import conditioning_of
from qdm_deploy.samplers import step_table


def peers(model: Case, folder: Path) -> dict[str, tuple[str, Callable[[], StepSession]]]:
    """What is compared: name, what runs it, and how it is opened."""

    def ours(name: str, options: dict[str, Any]) -> Callable[[], StepSession]:
        return lambda: OnnxRuntimeSession(write_graph(model, model.built(**options), "onnxruntime", folder / name))

    def theirs(config: str) -> Callable[[], StepSession]:
        return lambda: modelopt_session(model, config)

    def static(method: CalibrationMethod) -> Callable[[], StepSession]:
        return lambda: quantized_static(model, method, folder / method.name)

    return {
        "ours, symmetric min-max": ("onnxruntime", ours("plain", PLAIN)),
        "ours, default": ("onnxruntime", ours("default", FULL)),
        "modelopt INT8_DEFAULT_CFG": ("simulation", theirs("INT8_DEFAULT_CFG")),
        "modelopt, diffusers filter": ("simulation", theirs("INT8_DIFFUSERS")),
        "modelopt INT8_SMOOTHQUANT_CFG": ("simulation", theirs("INT8_SMOOTHQUANT_CFG")),
        "quantize_static, min-max": ("onnxruntime", static(CalibrationMethod.MinMax)),
        "quantize_static, percentile": ("onnxruntime", static(CalibrationMethod.Percentile)),
    }


def main() -> None:
    arguments = parser("ModelOpt and ONNX Runtime's quantization beside ours, on the embedded model.")
    arguments.add_argument("--seeds", type=int, default=64)
    arguments.add_argument("--steps", type=int, default=20)
    arguments.add_argument("--calibration-samples", type=int, default=16)
    arguments.add_argument("--seed", type=int, default=0, help="of the calibration; different ones share no trajectory")
    arguments.add_argument("--cache", type=Path, help="folder of finished rows, to go on from after an interruption")
    given = arguments.parse_args()
    model = case("fashion", samples=given.calibration_samples, steps=CALIBRATION_STEPS, seed=given.seed << 20)
    spec = model.checkpoint.spec
    seeds = range(FIRST_SEED, FIRST_SEED + given.seeds)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        with OnnxRuntimeSession(write_float(model, Path(scratch) / "float")) as session:
            say("float reference")
            table = step_table(model.schedule, "ddim", given.steps)
            reference = reference_run(session, table, seeds, spec, conditioning=conditioning_of(spec, given.seeds))
        for number, (name, (runs, opened)) in enumerate(peers(model, Path(scratch)).items()):
            cached = given.cache and given.cache / (
                f"peers-{model.checkpoint.weights_sha256[:12]}-{number}-{given.seed}-{given.calibration_samples}-{given.seeds}x{given.steps}.json"
            )
            if cached and cached.is_file():
                rows.append(json.loads(cached.read_text()))
                continue
            with opened() as session:
                row, _ = compare_with(reference, session, spec, target="onnxruntime", backend=runs)
            rows.append(
                {
                    "quantizer": name,
                    "run by": runs,
                    "eps SQNR dB": row.eps_sqnr_mean_db,
                    "last step": row.eps_sqnr_db[-1],
                    "PSNR dB": row.psnr_mean_db,
                    "worst PSNR": row.psnr_min_db,
                }
            )
            if cached:
                given.cache.mkdir(parents=True, exist_ok=True)
                cached.write_text(json.dumps(rows[-1]))
            say(f"{name}: {row.eps_sqnr_mean_db:.2f} dB, PSNR {row.psnr_mean_db:.2f} dB")
    columns = ["quantizer", "run by", "eps SQNR dB", "last step", "PSNR dB", "worst PSNR"]
    extra = {
        "seeds": given.seeds,
        "steps": given.steps,
        "sampler": "ddim",
        "calibration_samples": given.calibration_samples,
        "calibration_seed": given.seed,
    }
    finish("peers", columns, rows, extra, save=given.save)


if __name__ == "__main__":
    main()
