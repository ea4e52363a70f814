"""Everything that needs an NVIDIA GPU, in one go, into one JSON file. Without a GPU it says so and exits with 4.

Engines of a bundle on TensorRT and TensorRT-RTX: build and audit, distance from ONNX Runtime, CUDA graphs on and off,
a sweep over batch sizes (INT8, float16, with step gains and without, with the heads apart), batches of one timestep
beside mixed ones, forms of scales at skip concatenations, and onnxruntime-gpu on the same graphs. A part that fails
leaves its error's own words in the file and the others go on; the file is written anew after each, because native code
may end the process.

    python benchmarks/gpu_suite.py fashion.qdm --out gpu.json
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
from lib.gpu_graphs import calibrated_graphs, plan_graphs
from lib.gpu_onnxruntime import measure_provider, offered_providers
from lib.gpu_timing import loop_ms, mixed_rows, run_ms
from qdm_deploy.artifacts.model_spec import ModelSpec

from qdm_deploy.artifacts.bundle import Bundle
from qdm_deploy.artifacts.files import new_file
from qdm_deploy.backends.onnxruntime.session import OnnxRuntimeSession
from qdm_deploy.backends.tensorrt.session import open_tensorrt
from qdm_deploy.building.speed import random_inputs
from qdm_deploy.engines.engine import engine_from_onnx
from qdm_deploy.engines.flavour import FLAVOURS
from qdm_deploy.engines.gpu import installed_gpu
from qdm_deploy.engines.request import BatchProfile, BuildOptions
from qdm_deploy.errors import EnvironmentProblem
from qdm_deploy.metrics.error import sqnr_db
from qdm_deploy.report.machine import library_versions, machine_card

Document = dict[str, Any]


def main() -> None:
    arguments = argparse.ArgumentParser(description="Everything that needs an NVIDIA GPU, into one JSON file.")
    arguments.add_argument("bundle", type=Path, help="a bundle of the embedded model, with the target tensorrt")
    arguments.add_argument("--out", type=Path, required=True)
    arguments.add_argument("--backends", default=",".join(FLAVOURS))
    arguments.add_argument("--graphs", help="measure only these, separated by commas")
    arguments.add_argument("--batches", default="1,4,16")
    arguments.add_argument("--runs", type=int, default=50)
    arguments.add_argument("--no-calibration", action="store_true", help="leave out what calibrates anew")
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
    with tempfile.TemporaryDirectory() as scratch:
        document["graphs"] = guarded(lambda: _graphs(bundle, Path(scratch), calibrate=not given.no_calibration))
        graphs: dict[str, Path] = {"bundle": bundle.graph("tensorrt"), "float32": bundle.graph("float")}
        graphs |= {name: Path(path) for name, path in document["graphs"].items() if name != "error"}
        if given.graphs is not None:
            graphs = {name: path for name, path in graphs.items() if name in given.graphs.split(",")}
        for backend in filter(None, given.backends.split(",")):
            say(backend)
            document[backend] = {}
            for name, graph in graphs.items():
                document[backend][name] = guarded(
                    lambda: _engine(backend, graph, bundle.model, batches, given.runs)  # noqa: B023  # called at once
                )
                _write(given.out, document)
        say("onnxruntime-gpu")
        document["onnxruntime-gpu"] = guarded(lambda: {provider: {} for provider in offered_providers()})
        for provider in tuple(name for name in document["onnxruntime-gpu"] if name != "error"):
            document["onnxruntime-gpu version"] = onnxruntime.__version__
            for name, graph in graphs.items():
                say(f"  {provider}, {name}")
                document["onnxruntime-gpu"][provider][name] = guarded(
                    lambda: measure_provider(graph, provider, bundle.model, batches, given.runs)  # noqa: B023  # as above
                )
                _write(given.out, document)
        document["graphs"] = sorted(graphs)
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


def say(text: str) -> None:
    """A line for the person who waits."""
    print(text, file=sys.stderr, flush=True)


def _graphs(bundle: Bundle, scratch: Path, *, calibrate: bool) -> Document:
    made = plan_graphs(bundle, scratch)
    return made | (calibrated_graphs(scratch) if calibrate else {})


def _engine(backend: str, graph: Path, model: ModelSpec, batches: tuple[int, ...], runs: int) -> Document:
    say(f"  {graph.parent.name}/{graph.name}")
    profile = BatchProfile(1, 4, max(*batches, 4))
    result: Document = {}
    sm = installed_gpu(backend).capability if FLAVOURS[backend].capabilities else None
    engine = engine_from_onnx(graph, backend=backend, sm=sm, profile=profile, planned=())
    result["build_seconds"] = engine.build_seconds
    result["plan_bytes"] = engine.path.stat().st_size
    result["kernels"] = engine.audit.summary()
    result["kernels_per_block"] = engine.audit.kernels_per_block()
    result["not_int8"] = [
        f"{item.name}: {item.reason}" for item in engine.audit.failures(engine.audit.quantized_layers())
    ]
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
        result["ms"] = {
            str(batch): {
                "run, cuda graphs": run_ms(session, model, batch, runs),
                "run, no cuda graphs": run_ms(plain, model, batch, runs),
                "loop, cuda graphs": loop_ms(session, model, batch, runs),
                "loop, no cuda graphs": loop_ms(plain, model, batch, runs),
            }
            for batch in batches
        }
        result["mixed timesteps"] = mixed_rows(session, model, 4, runs)
    result["one stream"] = guarded(lambda: _one_stream(backend, graph, model, profile, runs))
    return result


def _one_stream(backend: str, graph: Path, model: ModelSpec, profile: BatchProfile, runs: int) -> Document:
    options = BuildOptions(auxiliary_streams=0)
    with open_tensorrt(graph, backend, profile=profile, options=options) as session:
        return {"loop, cuda graphs, batch 4": loop_ms(session, model, 4, runs)}


if __name__ == "__main__":
    main()
