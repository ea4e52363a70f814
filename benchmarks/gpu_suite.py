"""Everything that needs an NVIDIA GPU, in one go, into one JSON file. Without a GPU it says so and exits with 4.

Engines of a bundle on TensorRT and TensorRT-RTX: build and audit, distance from ONNX Runtime, CUDA graphs on and off,
a sweep over batch sizes, batches of one timestep beside mixed ones; then what `forms.py` can switch in the tensorrt
graph (parts, types, step gains, skip concatenations), and onnxruntime-gpu on the same graphs. A part that fails leaves
its error's own words in the file and the others go on; the file is written anew after each, because native code may end
the process.

    python benchmarks/gpu_suite.py fashion.qdm --out gpu.json
    python benchmarks/gpu_suite.py fashion.qdm --out gpu.json --switches "" --graphs bundle --batches 4 --runs 5
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import onnxruntime
from lib.gpu_onnxruntime import measure_provider, offered_providers
from lib.gpu_timing import loop_ms, mixed_rows, run_ms
from lib.results import say

from qdm_deploy.artifacts.bundle import Bundle
from qdm_deploy.artifacts.files import new_file
from qdm_deploy.artifacts.pipeline_spec import Denoiser
from qdm_deploy.backends.onnxruntime.session import OnnxRuntimeSession
from qdm_deploy.backends.tensorrt.session import open_tensorrt
from qdm_deploy.engines.engine import engine_from_onnx
from qdm_deploy.engines.flavour import FLAVOURS
from qdm_deploy.engines.gpu import installed_gpu
from qdm_deploy.engines.request import BatchProfile
from qdm_deploy.errors import EnvironmentProblem
from qdm_deploy.metrics.error import sqnr_db
from qdm_deploy.report.machine import library_versions, machine_card
from qdm_deploy.samplers.random_inputs import random_inputs

Document = dict[str, Any]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("bundle", type=Path, help="a bundle of the embedded model, with the target tensorrt")
    arguments.add_argument("--out", type=Path, required=True)
    arguments.add_argument("--backends", default=",".join(FLAVOURS))
    arguments.add_argument("--graphs", help="measure only these, separated by commas")
    arguments.add_argument("--switches", default="parts,rest,gains,concat", help="of forms.py; they calibrate anew")
    arguments.add_argument("--batches", default="1,4,16")
    arguments.add_argument("--runs", type=int, default=50)
    given = arguments.parse_args()
    try:
        gpu = installed_gpu("tensorrt")
    except EnvironmentProblem as error:
        print(f"nothing was measured: {error}", file=sys.stderr)
        sys.exit(EnvironmentProblem.exit_code)
    batches = tuple(int(batch) for batch in given.batches.split(","))
    document: Document = {
        "benchmark": "gpu-suite",
        "machine": machine_card(),
        "versions": library_versions(),
        "gpu": {"name": gpu.name, "capability": gpu.capability, "driver": gpu.driver},
    }
    bundle = Bundle.open(given.bundle)
    model = bundle.pipeline.denoiser
    with tempfile.TemporaryDirectory() as scratch:
        graphs: dict[str, Path] = {"bundle": bundle.graph("tensorrt"), "float32": bundle.graph("float")}
        made = guarded(lambda: _switched(given.switches, Path(scratch)))
        document["graphs error"] = made.pop("error", None)
        graphs |= made
        if given.graphs is not None:
            graphs = {name: path for name, path in graphs.items() if name in given.graphs.split(",")}
        document["graphs"] = sorted(graphs)

        def measure(kind: str, part: Callable[[Path], Document]) -> None:
            document[kind] = {}
            for name, graph in graphs.items():
                say(f"{kind}, {name}")
                document[kind][name] = guarded(lambda: part(graph))  # noqa: B023  # called at once
                _write(given.out, document)

        for backend in filter(None, given.backends.split(",")):
            measure(backend, lambda graph: _engine(backend, graph, model, batches, given.runs))  # noqa: B023
        document["onnxruntime-gpu"] = guarded(
            lambda: {"version": onnxruntime.__version__, "offers": offered_providers()}
        )
        for provider in document["onnxruntime-gpu"].get("offers", ()):
            measure(provider, lambda graph: measure_provider(graph, provider, model, batches, given.runs))  # noqa: B023
    _write(given.out, document)
    print(json.dumps(document, default=str))


def guarded(part: Callable[[], Document]) -> Document:
    """What a part returns, or its error in its own words: the next part may still work."""
    try:
        return part()
    except Exception as error:  # noqa: BLE001  # ONNX Runtime's errors share no base class, and none may end the rest
        say(f"  {type(error).__name__}: {error}")
        return {"error": f"{type(error).__name__}: {error}"}


def _write(out: Path, document: Document) -> None:
    with new_file(out) as file:
        file.write_text(json.dumps(document, indent=1, default=str) + "\n", encoding="utf-8")


def _switched(switches: str, folder: Path) -> Document:
    """The tensorrt graphs of some switches, by "switch: variant"; the embedded model planned anew."""
    if not switches:
        return {}
    # Here, because a bundle alone is measured without PyTorch.
    from lib.case import case, save_form
    from lib.switches import SWITCHES

    model = case("fashion", samples=4)
    return {
        f"{name}: {label}": save_form(variant.emitted(), folder / f"{name}-{label}", "tensorrt")
        for name in switches.split(",")
        for label, variant in SWITCHES[name].variants(model, "tensorrt").items()
    }


def _engine(backend: str, graph: Path, model: Denoiser, batches: tuple[int, ...], runs: int) -> Document:
    profile = BatchProfile(1, 4, max(*batches, 4))
    sm = installed_gpu(backend).capability if FLAVOURS[backend].capabilities else None
    engine = engine_from_onnx(graph, backend=backend, sm=sm, profile=profile, planned=())
    failures = engine.audit.failures(engine.audit.quantized_layers())
    result: Document = {
        "build_seconds": engine.build_seconds,
        "plan_bytes": engine.path.stat().st_size,
        "kernels": engine.audit.summary(),
        "kernels_per_block": engine.audit.kernels_per_block(),
        "not_int8": [f"{item.name}: {item.reason}" for item in failures],
    }
    with ExitStack() as stack:
        session = stack.enter_context(open_tensorrt(graph, backend, profile=profile))
        plain = stack.enter_context(open_tensorrt(graph, backend, profile=profile, cuda_graphs=False))
        reference = stack.enter_context(OnnxRuntimeSession(graph))
        inputs = random_inputs(model, 4)
        expected, found = reference.run(inputs), session.run(inputs)
        result["session"] = session.describe()  # after a step: only then is it known whether steps can be recorded
        result["sqnr_db_against_onnxruntime"] = {
            name: sqnr_db(getattr(expected, name), getattr(found, name)) for name in ("next_sample", "x0")
        }
        ways = {"cuda graphs": session, "no cuda graphs": plain}
        result["ms"] = {
            str(batch): {
                f"{kind}, {name}": timing(way, model, batch, runs)
                for kind, timing in (("run", run_ms), ("loop", loop_ms))
                for name, way in ways.items()
            }
            for batch in batches
        }
        result["mixed timesteps"] = mixed_rows(session, model, 4, runs)
    return result


if __name__ == "__main__":
    main()
