"""From a bundle and the name of a backend to an open session."""

import platform
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from importlib.util import find_spec
from typing import Literal

from qdm_deploy.artifacts.bundle import Bundle
from qdm_deploy.backends.choice import Candidate, choose
from qdm_deploy.backends.onnxruntime.session import OnnxRuntimeSession
from qdm_deploy.backends.openvino.session import KEPT_BATCH_SIZES, OpenVinoSession
from qdm_deploy.backends.tensorrt.session import open_tensorrt
from qdm_deploy.engines.flavour import FLAVOURS
from qdm_deploy.errors import InputError
from qdm_deploy.progress import SILENT, Progress
from qdm_deploy.runtime.cpu import saturates_int8
from qdm_deploy.runtime.session import StepSession

__all__ = ["BACKENDS", "automatic_backend", "choose_backend", "open_session"]

BACKENDS = ("onnxruntime", "openvino", "tensorrt", "tensorrt-rtx")


def automatic_backend(targets: tuple[str, ...]) -> str:
    """The CPU backend that is expected to be the fastest here, of those a bundle with these targets was built for."""
    return _cpu_backends(targets)[0]


def _cpu_backends(targets: tuple[str, ...]) -> tuple[str, ...]:
    """The CPU backends that this machine has and the targets allow, the one that is usually faster first.

    Where INT8 products saturate that is ONNX Runtime: it multiplies integers, OpenVINO float32.
    """
    on_x86 = platform.machine().lower() in ("x86_64", "amd64")
    if not on_x86 or "openvino" not in targets or find_spec("openvino") is None:
        return ("onnxruntime",)
    return ("onnxruntime", "openvino") if saturates_int8() else ("openvino", "onnxruntime")


def _versions(backend: str) -> str:
    """The distribution that a backend's module comes from, and its version."""
    try:
        return f"{backend} {version(backend)}"
    except PackageNotFoundError:
        # The module onnxruntime is also that of onnxruntime-gpu and others, installed in its place.
        names = sorted(set(packages_distributions().get(backend, ())))
        return " ".join(f"{name} {version(name)}" for name in names) or backend


def choose_backend(
    bundle: Bundle,
    backend: str = "auto",
    precision: Literal["auto", "int8", "float"] = "int8",
    *,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> Candidate:
    """What ``open_session`` opens for these arguments: a backend and a precision, neither of them "auto".

    Where there is something to choose, the candidates are timed once per bundle and machine
    (``qdm_deploy.backends.choice``), and ``progress`` is told what was taken and why.

    Raises:
        InputError: unknown backend or precision, or fewer than one thread.
    """
    if backend not in ("auto", *BACKENDS):
        raise InputError(f"the backend {backend!r} is unknown; choose one of auto, {', '.join(BACKENDS)}")
    if precision not in ("auto", "int8", "float"):
        raise InputError(f"the precision {precision!r} is unknown; choose auto, int8 or float")
    if threads is not None and threads < 1:
        raise InputError(f"{threads} threads cannot run anything; give at least 1, or leave it out for all cores")
    backends = _cpu_backends(bundle.manifest.targets) if backend == "auto" else (backend,)
    kinds: list[Literal["int8", "float"]] = ["int8", "float"] if precision == "auto" else [precision]
    if precision == "auto" and (backend in FLAVOURS or not bundle.has_graph("float")):
        # On a GPU each candidate is an engine to build, which may take minutes: INT8 is what it was made for.
        kinds = ["int8"]
    candidates: list[Candidate] = [(name, kind) for kind in kinds for name in backends]
    if len(candidates) == 1:
        return candidates[0]
    choice = choose(
        bundle,
        candidates,
        lambda candidate: open_session(
            bundle, candidate[0], precision=candidate[1], threads=threads, mode="throughput"
        ),
        [_versions(name) for name in backends],
        threads=threads,
        progress=progress,
    )
    return choice.backend, choice.precision


def open_session(
    bundle: Bundle,
    backend: str = "auto",
    *,
    precision: Literal["auto", "int8", "float"] = "int8",
    threads: int | None = None,
    mode: Literal["latency", "throughput"] = "latency",
    progress: Progress = SILENT,
    kept_batch_sizes: int = KEPT_BATCH_SIZES,
) -> StepSession:
    """Open the bundle's step graph on a backend of this machine.

    Args:
        bundle: an opened bundle.
        backend: one of ``BACKENDS``, or ``"auto"``: the CPU backend that is the fastest here (``choose_backend``).
        precision: ``"int8"``: the graph of the backend's own target; ``"float"``: the unquantized step graph, in
            float32; ``"auto"``: whichever is faster here.
        threads: CPU threads; None takes the cores this process may use. A GPU backend has none.
        mode: what matters: how soon a small batch's step ends, or how many images are made. The CPU backends know the
            difference.
        progress: told what an automatic choice took and why, and when an engine has to be built first, which takes
            seconds to minutes.
        kept_batch_sizes: batch sizes that a backend which prepares each one (openvino compiles it, tensorrt records it)
            keeps ready.

    Raises:
        InputError: unknown backend or precision, or fewer than one thread.
        BundleError: the bundle has no graph for it, or the graph cannot be loaded.
        EnvironmentProblem: the backend is not installed, or its driver or GPU is missing.
        EngineError: the engine of a GPU backend cannot be built or loaded.
    """
    backend, precision = choose_backend(bundle, backend, precision, threads=threads, progress=progress)
    if backend in FLAVOURS:
        graph = bundle.graph("tensorrt" if precision == "int8" else "float")
        return open_tensorrt(graph, backend, kept_batch_sizes=kept_batch_sizes, progress=progress)
    if backend == "openvino":
        graph = bundle.graph("openvino" if precision == "int8" else "float")
        return OpenVinoSession(
            graph,
            threads=threads,
            precision="auto" if precision == "int8" else "f32",
            mode=mode,
            kept_batch_sizes=kept_batch_sizes,
            # The bundle's files were checked against its id when it was opened.
            identity=f"{bundle.id}/{graph.name}",
        )
    graph = bundle.graph("onnxruntime" if precision == "int8" else "float")
    return OnnxRuntimeSession(graph, threads=threads, mode=mode)
