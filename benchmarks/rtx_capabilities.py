"""What TensorRT-RTX answers on the GPU at hand: which compute capabilities it builds for there, loads there and runs.

Each capability is tried in a process of its own, because native code may end it: build, load, three steps of the
bundle's graph beside ONNX Runtime on the CPU. Without a GPU it says so and exits with 4.

    python benchmarks/rtx_capabilities.py fashion.qdm --save
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench import finish, parser, say

from qdm_deploy.artifacts.bundle import Bundle
from qdm_deploy.artifacts.files import sha256_of
from qdm_deploy.backends.onnxruntime.session import OnnxRuntimeSession
from qdm_deploy.backends.tensorrt.cuda import CudaRuntime
from qdm_deploy.backends.tensorrt.session import TensorRtSession
from qdm_deploy.build.speed import random_inputs
from qdm_deploy.engines.builder import build_plan
from qdm_deploy.engines.flavour import FLAVOURS
from qdm_deploy.engines.gpu import installed_gpu
from qdm_deploy.engines.request import BatchProfile, BuildOptions, BuildRequest
from qdm_deploy.errors import EnvironmentProblem, QdmError
from qdm_deploy.metrics.error import sqnr_db

BACKEND = "tensorrt-rtx"
CURRENT = "current"
_LIMIT_SECONDS = 120


def answer(graph: Path, bundle: Bundle, capability: str, folder: Path) -> dict[str, Any]:
    """How far the library comes with one capability; ``stopped`` holds its own words where it goes no further."""
    found: dict[str, Any] = {"capability": capability, "builds": False, "loads": False, "runs": False}
    request = BuildRequest(
        backend=BACKEND,
        graph=graph,
        plan=folder / "engine.plan",
        log=folder / "log.txt",
        layers=folder / "layers.json",
        # None leaves the library's default, the GPU of this machine.
        sm=None if capability == CURRENT else capability,
        profile=BatchProfile(1, 4, 16),
        options=BuildOptions(),
        timing_cache=None,
    )
    try:
        found["build seconds"] = build_plan(request, lambda *_: None)
        found["builds"] = True
        with TensorRtSession(
            FLAVOURS[BACKEND], request.plan, CudaRuntime(), gpu=installed_gpu(BACKEND), graph_sha256=sha256_of(graph)
        ) as session:
            found["loads"] = True
            with OnnxRuntimeSession(graph) as reference:
                inputs = random_inputs(bundle.model, 4)
                expected, given = reference.run(inputs), session.run(inputs)
            found["runs"] = True
            found["SQNR dB"] = sqnr_db(expected.next_sample, given.next_sample)
    except QdmError as error:
        found["stopped"] = str(error)
    return found


def _tried(path: Path, capability: str) -> dict[str, Any]:
    """``answer`` in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, str(path), "--one", capability, "--folder", folder]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            return {"capability": capability, "stopped": f"no answer in {_LIMIT_SECONDS} s"}
        if done.returncode == 0:
            found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
            return found
        words = (done.stderr or done.stdout).strip().splitlines()[-1:]
        return {"capability": capability, "stopped": f"the process ended with {done.returncode}: {' '.join(words)}"}


def main() -> None:
    arguments = parser("What TensorRT-RTX answers on this GPU.")
    arguments.add_argument("bundle", type=Path, help="a bundle with the target tensorrt")
    arguments.add_argument("--one", help=f"try one capability here and print a JSON line; '{CURRENT}' is this GPU's")
    arguments.add_argument("--folder", type=Path, help="where --one writes its engine")
    given = arguments.parse_args()
    bundle = Bundle.open(given.bundle)
    if given.one is not None:
        print(json.dumps(answer(bundle.graph("tensorrt"), bundle, given.one, given.folder)))
        return
    try:
        gpu, library = installed_gpu(BACKEND), FLAVOURS[BACKEND].load()
    except EnvironmentProblem as error:
        say(f"nothing was measured: {error}")
        sys.exit(EnvironmentProblem.exit_code)
    rows = []
    for capability in (CURRENT, *FLAVOURS[BACKEND].capabilities):
        rows.append(_tried(given.bundle, capability))
        say(f"{capability}: {rows[-1].get('stopped') or 'runs'}")
    card = {"name": gpu.name, "capability": gpu.capability, "driver": gpu.driver, "library": str(library.__version__)}
    finish(
        "rtx-capabilities", ["capability", "builds", "loads", "runs", "SQNR dB"], rows, {"gpu": card}, save=given.save
    )


if __name__ == "__main__":
    main()
