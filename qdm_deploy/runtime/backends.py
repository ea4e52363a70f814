"""From a bundle and the name of a backend to an open session."""

import platform
from contextlib import ExitStack
from importlib.util import find_spec
from typing import Literal

from qdm_deploy.artifacts.bundle import Bundle
from qdm_deploy.engines.flavour import FLAVOURS
from qdm_deploy.errors import InputError
from qdm_deploy.progress import SILENT, Progress
from qdm_deploy.runtime.mixed_session import MixedSession
from qdm_deploy.runtime.onnxruntime_session import OnnxRuntimeSession
from qdm_deploy.runtime.openvino_session import OpenVinoSession
from qdm_deploy.runtime.session import StepSession
from qdm_deploy.runtime.tensorrt_session import open_tensorrt

__all__ = ["BACKENDS", "automatic_backend", "open_session"]

BACKENDS = ("onnxruntime", "openvino", "tensorrt", "tensorrt-rtx")


def automatic_backend(targets: tuple[str, ...]) -> str:
    """The fastest CPU backend that this machine has and a bundle with these targets was built for."""
    on_x86 = platform.machine().lower() in ("x86_64", "amd64")
    if on_x86 and "openvino" in targets and find_spec("openvino") is not None:
        return "openvino"
    return "onnxruntime"


def open_session(
    bundle: Bundle,
    backend: str = "auto",
    *,
    precision: Literal["int8", "float"] = "int8",
    threads: int | None = None,
    progress: Progress = SILENT,
) -> StepSession:
    """Open the bundle's step graph on a backend of this machine.

    Args:
        bundle: an opened bundle.
        backend: one of ``BACKENDS``, or ``"auto"``: openvino on x86 where it is installed and the bundle has its
            graph, otherwise onnxruntime.
        precision: ``"int8"``: the graph of the backend's own target, with the float graph for those steps that the
            bundle runs in float (a ``MixedSession``); ``"float"``: the unquantized step graph, in float32.
        threads: CPU threads; None takes the cores this process may use. A GPU backend has none.
        progress: told when an engine has to be built first, which takes seconds to minutes.

    Raises:
        InputError: unknown backend or precision, or fewer than one thread.
        BundleError: the bundle has no graph for it, or the graph cannot be loaded.
        EnvironmentProblem: the backend is not installed, or its driver or GPU is missing.
        EngineError: the engine of a GPU backend cannot be built or loaded.
    """
    if backend not in ("auto", *BACKENDS):
        raise InputError(f"the backend {backend!r} is unknown; choose one of auto, {', '.join(BACKENDS)}")
    if precision not in ("int8", "float"):
        raise InputError(f"the precision {precision!r} is unknown; choose int8 or float")
    if threads is not None and threads < 1:
        raise InputError(f"{threads} threads cannot run anything; give at least 1, or leave it out for all cores")
    if backend == "auto":
        backend = automatic_backend(bundle.manifest.targets)
    float_below = bundle.manifest.float_below
    if precision == "float" or float_below is None:
        return _open_graph(bundle, backend, precision, threads, progress)
    with ExitStack() as opened:
        parts = [
            opened.enter_context(_open_graph(bundle, backend, kind, threads, progress)) for kind in ("int8", "float")
        ]
        session = MixedSession(parts[0], parts[1], float_below)
        opened.pop_all()  # the mixed session closes them from here on
        return session


def _open_graph(
    bundle: Bundle, backend: str, precision: Literal["int8", "float"], threads: int | None, progress: Progress
) -> StepSession:
    if backend in FLAVOURS:
        return open_tensorrt(bundle.graph("tensorrt" if precision == "int8" else "float"), backend, progress=progress)
    if backend == "openvino":
        graph = bundle.graph("openvino" if precision == "int8" else "float")
        return OpenVinoSession(graph, threads=threads, precision="auto" if precision == "int8" else "f32")
    return OnnxRuntimeSession(bundle.graph("onnxruntime" if precision == "int8" else "float"), threads=threads)
