"""What a build costs against the size of the model: seconds of each stage, peak memory and bytes, for four U-Nets.

Each is built by `qdm-deploy build` in a process of its own, with the little calibration that shows the cost of every
stage: 6.5 M (embedded), 35.7 M (DDPM CIFAR-10), 274 M (LDM-4) and 860 M parameters (Stable Diffusion 1.5, 64 x 64
latents, text states), the last three with random weights. "anonymous" is the memory that nothing but the process can
give back; the rest of the peak are pages of the checkpoint's own file, which is mapped and not copied.

    python benchmarks/build_scale.py --save
    pip install matplotlib; python benchmarks/build_scale.py --plot benchmarks/results/DATE-build-scale.json
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from lib.bench import finish, parser, say
from lib.random_models import random_model
from safetensors.numpy import save_file

from qdm_deploy.building.bundle_from_checkpoint import EMBEDDED_MODEL

MODELS = ("fashion", "cifar10", "ldm4", "sd15")
PLOT = Path(__file__).parent.parent / "docs" / "build-scale.svg"
# Every stage runs, on as little as it can: two timesteps of one trajectory, one sample to judge.
_LITTLE = {
    "steps": 4, "calib-samples": 1, "calib-steps": 2, "step-bins": 1, "channel-scales": "none", "keep-fp": "none",
    "verify-samples": 1, "verify-steps": 2, "min-psnr": 0, "min-sqnr": 0, "min-speedup": 0,
}  # fmt: skip


class Peak(threading.Thread):
    """The most memory that a process held, of all kinds and of the anonymous kind, looked at ten times a second."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.status = Path(f"/proc/{pid}/status")
        self.anonymous = self.resident = 0

    def run(self) -> None:
        """Until the process is gone."""
        while True:
            try:
                fields = dict(line.split(":", 1) for line in self.status.read_text().splitlines())
                self.anonymous = max(self.anonymous, int(fields["RssAnon"].split()[0]))
                self.resident = max(self.resident, int(fields["VmHWM"].split()[0]))
            except (OSError, KeyError, ValueError):
                return
            time.sleep(0.1)


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
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        peak = Peak(process.pid)
        peak.start()
        output, _ = process.communicate()
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    report = json.loads(output)["report"]
    stages = {stage: seconds for stage, seconds in report["stage_seconds"].items() if stage not in _NOT_RUN}
    return {
        "model": name,
        "parameters M": report["size"]["float_bytes"] / 4e6,
        "seconds": time.perf_counter() - start,
        "peak GiB": peak.resident / 1024**2,
        "anonymous GiB": peak.anonymous / 1024**2,
        "float MB": report["size"]["float_bytes"] / 1e6,
        "INT8 MB": report["size"]["int8_bytes"]["onnxruntime"] / 1e6,
        **stages,
    }


_NOT_RUN = ("sensitivity", "engines", "reconstruct")


def plot(result: Path) -> None:
    """Stages against parameters, both axes logarithmic, as docs/build-scale.svg."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "build-scale"  # the same file from the same result
    from matplotlib import pyplot as plt

    rows = json.loads(result.read_text())["rows"]
    sizes = [row["parameters M"] for row in rows]
    stages = [
        key for key in rows[0] if key in ("load", "export", "calibrate", "plan", "emit", "compare", "check", "speed")
    ]
    figure, (time_axis, memory_axis) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for stage in stages:
        time_axis.plot(sizes, [row[stage] for row in rows], marker="o", label=stage)
    time_axis.set(xscale="log", yscale="log", xlabel="parameters (millions)", ylabel="seconds")
    time_axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0))
    for kind in ("peak GiB", "anonymous GiB"):
        memory_axis.plot(sizes, [row[kind] for row in rows], marker="o", label=kind.removesuffix(" GiB"))
    memory_axis.set(xscale="log", yscale="log", xlabel="parameters (millions)", ylabel="peak memory (GiB)")
    memory_axis.legend()
    figure.savefig(PLOT, metadata={"Date": None})
    say(f"wrote {PLOT}")


def main() -> None:
    arguments = parser("Cost of a build against the size of the model.")
    arguments.add_argument("--models", default=",".join(MODELS))
    arguments.add_argument("--plot", type=Path, help="only draw docs/build-scale.svg from this result")
    given: argparse.Namespace = arguments.parse_args()
    if given.plot is not None:
        plot(given.plot)
        return
    rows = []
    for name in given.models.split(","):
        say(name)
        with tempfile.TemporaryDirectory() as folder:
            rows.append(build(name, Path(folder)))
    columns = ["model", "parameters M", "seconds", "peak GiB", "anonymous GiB", "float MB", "INT8 MB"]
    columns += [key for key in rows[0] if key not in columns]
    finish("build-scale", columns, rows, {"options": _LITTLE}, save=given.save)


if __name__ == "__main__":
    main()
