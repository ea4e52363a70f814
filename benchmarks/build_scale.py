"""What a build costs against the size of the model: seconds of each stage, peak memory and bytes, for four U-Nets.

Each is built by `qdm-deploy build` in a process of its own, with the little calibration that shows the cost of every
stage: 6.5 M (embedded), 35.7 M (DDPM CIFAR-10), 274 M (LDM-4) and 860 M parameters (Stable Diffusion 1.5, 64 x 64
latents, text states), the last three with random weights. The peak counts pages of the checkpoint's own file too,
which is mapped and not copied.

    python benchmarks/build_scale.py --save zen5
    python benchmarks/build_scale.py --models tiny
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from lib.random_models import random_model
from lib.results import finish, parser, say
from safetensors.numpy import save_file

from qdm_deploy.building.bundle_from_checkpoint import EMBEDDED_MODEL

# Every stage runs, on as little as it can: two timesteps of one trajectory, one sample to judge.
_LITTLE = {
    "steps": 4, "calib-samples": 1, "calib-steps": 2, "step-bins": 1, "channel-scales": "none", "keep-fp": "none",
    "verify-samples": 1, "verify-steps": 2, "min-psnr": 0, "min-sqnr": 0, "min-speedup": 0,
}  # fmt: skip


def build(name: str, folder: Path) -> dict[str, Any]:
    """Build one model; its row of the table."""
    command = [str(Path(sys.executable).with_name("qdm-deploy")), "build", "--int8", "--json"]
    model = EMBEDDED_MODEL if name == "fashion" else random_model(name, folder / name)
    command += [str(model), "--out", str(folder / f"{name}.qdm"), "--no-sensitivity", "--no-engines"]
    command += [f"--{option}={value}" for option, value in _LITTLE.items()]
    if name == "sd15":
        states = np.random.default_rng(0).standard_normal((2, 77, 768), dtype=np.float32)
        save_file({"encoder_hidden_states": states}, folder / "states.safetensors")
        command += ["--conditioning", str(folder / "states.safetensors")]
    start = time.perf_counter()
    with (folder / "result.json").open("w") as output:
        process = subprocess.Popen(command, stdout=output)
        _, status, used = os.wait4(process.pid, 0)
    if status != 0:
        raise SystemExit(f"{' '.join(command)} ended with {os.waitstatus_to_exitcode(status)}")
    report = json.loads((folder / "result.json").read_text())["report"]
    return {
        "model": name,
        "parameters M": report["size"]["float_bytes"] / 4e6,
        "seconds": time.perf_counter() - start,
        "peak GiB": used.ru_maxrss / 1024**2,
        "float MB": report["size"]["float_bytes"] / 1e6,
        "INT8 MB": report["size"]["int8_bytes"]["onnxruntime"] / 1e6,
        **{stage: seconds for stage, seconds in report["stage_seconds"].items() if seconds > 0.0},
    }


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--models", default="fashion,cifar10,ldm4,sd15")
    given = arguments.parse_args()
    rows = []
    for name in given.models.split(","):
        say(name)
        with tempfile.TemporaryDirectory() as folder:
            rows.append(build(name, Path(folder)))
    finish("build-scale", rows, {"options": _LITTLE}, save=given.save)


if __name__ == "__main__":
    main()
