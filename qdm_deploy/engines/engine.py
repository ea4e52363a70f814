"""From an ONNX step graph to an engine that can be run: built once, audited, cached."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qdm_deploy.artifacts.files import sha256_of
from qdm_deploy.engines.audit import EngineAudit, PlannedLayer, audit_of_files
from qdm_deploy.engines.cache import EngineCache, EngineIdentity
from qdm_deploy.engines.flavour import flavour_of, target_of
from qdm_deploy.engines.onnx_files import data_files
from qdm_deploy.engines.request import BatchProfile, BuildOptions, BuildRequest
from qdm_deploy.engines.worker import run_build
from qdm_deploy.errors import EngineError
from qdm_deploy.progress import SILENT, Progress

__all__ = ["Engine", "engine_from_onnx"]

_NAMED_FAILURES = 10


@dataclass(frozen=True)
class Engine:
    """A built engine in the cache.

    Attributes:
        path: The serialized engine (plan).
        audit: Its compiled kernels.
        build_seconds: How long the build took, when it was built.
        from_cache: Whether it was there already.
        key: Its name in the cache.
        log: The builder's full log.
    """

    path: Path
    audit: EngineAudit
    build_seconds: float
    from_cache: bool
    key: str
    log: Path


def engine_from_onnx(
    graph: Path,
    *,
    backend: str = "tensorrt-rtx",
    sm: str | None = None,
    profile: BatchProfile | None = None,
    options: BuildOptions | None = None,
    cache: EngineCache | None = None,
    planned: Sequence[PlannedLayer] | None = None,
    progress: Progress = SILENT,
) -> Engine:
    """Build the engine of a graph, or take it from the cache, and check that what was planned in INT8 is INT8.

    Args:
        graph: The ``.onnx`` file; its external data lies beside it.
        backend: "tensorrt-rtx" (needs no GPU) or "tensorrt" (builds for the GPU of this machine).
        sm: Compute capability to build for, such as "8.9"; None: 8.9 for TensorRT-RTX, the GPU at hand for TensorRT.
        profile: Batch sizes to serve; 1 to 16, fastest at 4, by default.
        options: Builder options.
        cache: Where engines are kept; the user's cache folder by default.
        planned: Layers that must be INT8. None: every convolution and matrix product whose two operands the graph
            dequantizes; an empty sequence: nothing is checked.
        progress: Told about the build's phases.

    Raises:
        InputError: Unknown backend or capability.
        EnvironmentProblem: The library, its GPU or a writable cache is missing.
        EngineError: The graph cannot be read, parsed or built, the builder crashed, or a planned layer is not INT8.
        ResourceProblem: Disk or memory ran out.
    """
    flavour = flavour_of(backend)
    profile = profile or BatchProfile()
    options = options or BuildOptions()
    cache = cache or EngineCache()
    library = flavour.load()
    capability, target = target_of(flavour, sm)
    graph = graph.absolute()
    data = data_files(graph)
    identity = EngineIdentity(
        graph_sha256=sha256_of(graph),
        data_sha256={path.relative_to(graph.parent).as_posix(): sha256_of(path) for path in data},
        backend=backend,
        library_version=str(library.__version__),
        target=target,
        profile=profile,
        options=options,
    )

    def build(folder: Path) -> float:
        progress.say(f"building a {backend} engine for {target}, batch {profile}; this takes seconds to minutes, once")
        layers = folder / "layers.json"
        request = BuildRequest(
            backend=backend,
            graph=graph,
            plan=folder / "engine.plan",
            log=folder / "log.txt",
            layers=layers,
            sm=capability,
            profile=profile,
            options=options,
            timing_cache=cache.timing_cache(identity) if flavour.timing_cache else None,
        )
        seconds = run_build(request, progress=progress)
        (folder / "audit.json").write_text(audit_of_files(request.log, layers).to_json(), encoding="utf-8")
        layers.unlink(missing_ok=True)
        return seconds

    def entry() -> Engine:
        try:
            folder, meta, from_cache = cache.entry(identity, graph, build, progress=progress)
        except EngineError as error:
            log = cache.failure_log(identity.key)
            raise EngineError(f"{error}\nThe builder's log: {log}") from error
        plan, log = folder / "engine.plan", folder / "log.txt"
        try:
            audit = EngineAudit.from_json((folder / "audit.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            # Another process made room in the cache just now; its limit is far too small if that goes on.
            progress.say(f"the cached engine {identity.key[:12]} was removed by another process and is built again")
            return entry()
        return Engine(plan, audit, meta.build_seconds, from_cache, identity.key, log)

    engine = entry()
    audit = engine.audit
    _check(engine, graph, audit.quantized_layers() if planned is None else planned)
    return engine


def _check(engine: Engine, graph: Path, planned: Sequence[PlannedLayer]) -> None:
    failures = engine.audit.failures(planned)
    if not failures:
        return
    lines = [f"{failure.name}: {failure.reason}" for failure in failures[:_NAMED_FAILURES]]
    if len(failures) > _NAMED_FAILURES:
        lines.append(f"and {len(failures) - _NAMED_FAILURES} more")
    raise EngineError(
        f"{len(failures)} of {len(planned)} planned INT8 layers of {graph} are not INT8 in the engine:\n  "
        + "\n  ".join(lines)
        + f"\nThe engine and its log are in {engine.path.parent}; keep those layers in floating point in the plan, or "
        "find what stands between their DequantizeLinear and them"
    )
