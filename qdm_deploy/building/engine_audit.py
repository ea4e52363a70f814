"""TensorRT engines of a bundle: build, audit, cache."""

from dataclasses import dataclass
from pathlib import Path

from qdm_deploy.artifacts.bundle import Bundle
from qdm_deploy.artifacts.plan import QuantizationPlan
from qdm_deploy.engines.audit import PlannedLayer
from qdm_deploy.engines.cache import CachedEngine, EngineCache
from qdm_deploy.engines.cache_limit import bytes_of
from qdm_deploy.engines.engine import Engine, engine_from_onnx
from qdm_deploy.engines.flavour import flavour_of
from qdm_deploy.engines.request import BatchProfile, BuildOptions
from qdm_deploy.errors import InputError
from qdm_deploy.progress import SILENT, Progress
from qdm_deploy.report.model import EngineRow

__all__ = ["CachedEngines", "EngineResult", "audit_row", "build_engine", "cached_engines", "prune_engines"]


@dataclass(frozen=True)
class EngineResult:
    """A cached engine: its audit as a row, its file, the builder's log, and whether it was there already."""

    row: EngineRow
    path: Path
    log: Path
    from_cache: bool


def build_engine(
    bundle: Path,
    backend: str = "tensorrt-rtx",
    sm: str | None = None,
    profile: tuple[int, int, int] = (1, 4, 16),
    optimization_level: int = 3,
    workspace: str | None = None,
    progress: Progress = SILENT,
) -> EngineResult:
    """Build the engine of a bundle, or find it in the cache.

    Args:
        bundle: the bundle's folder.
        backend: "tensorrt-rtx" (needs no GPU) or "tensorrt" (builds for the GPU of this machine).
        sm: compute capability, such as "8.9"; None: 8.9 for TensorRT-RTX, the GPU at hand for TensorRT.
        profile: smallest, best and largest batch.
        optimization_level: how long the builder searches, 0 to 5.
        workspace: upper limit of a kernel's scratch memory, such as "2G"; None: the library's own.
        progress: where to report.

    Raises:
        InputError: an unknown compute capability, batch sizes out of order, or options outside their range.
        BundleError: the bundle is damaged or has no tensorrt graph.
        EngineError: the build failed.
    """
    batches = BatchProfile(*profile)
    options = BuildOptions(optimization_level, None if workspace is None else bytes_of(workspace))
    opened = Bundle.open(bundle)
    plan = QuantizationPlan.load(opened.file("unet/plan.json").parent)
    row, engine = audit_row(
        opened.graph("tensorrt"), plan, backend=backend, sm=sm, profile=batches, options=options, progress=progress
    )
    return EngineResult(row, engine.path, engine.log, engine.from_cache)


def audit_row(
    graph: Path,
    plan: QuantizationPlan,
    *,
    backend: str,
    sm: str | None,
    profile: BatchProfile | None = None,
    options: BuildOptions | None = None,
    progress: Progress = SILENT,
) -> tuple[EngineRow, Engine]:
    """Build the engine of a ``tensorrt`` graph and hold it against the plan that the graph was emitted from."""
    planned = [
        PlannedLayer(item.name, "convolution" if item.layer.kind == "conv" else "gemm") for item in plan.quantized
    ]
    # The verdict reports what is not INT8; an engine that fails its audit is still worth looking at.
    engine = engine_from_onnx(
        graph, backend=backend, sm=sm, profile=profile, options=options, planned=(), progress=progress
    )
    failures = engine.audit.failures(planned)
    row = EngineRow(
        backend=backend,
        sm=sm or flavour_of(backend).default_sm or "this GPU",
        planned=len(planned),
        int8=len(planned) - len(failures),
        kernels=engine.audit.summary(),
        build_seconds=engine.build_seconds,
        failures=tuple(f"{failure.name}: {failure.reason}" for failure in failures),
    )
    return row, engine


@dataclass(frozen=True)
class CachedEngines:
    """Engines of this machine's cache, or those just removed from it; the folder, and the bytes it may take."""

    root: Path
    max_bytes: int
    engines: tuple[CachedEngine, ...]


def cached_engines() -> CachedEngines:
    """What the engine cache holds, least recently used first. Files are not hashed: that is done before one is loaded.

    Raises:
        InputError: ``QDM_ENGINE_CACHE_LIMIT`` is not a size.
    """
    cache = EngineCache()
    engines = sorted(cache.list_engines(), key=lambda engine: engine.last_used)
    return CachedEngines(cache.root, cache.max_bytes, tuple(engines))


def prune_engines(max_size: str | None = None, *, everything: bool = False) -> CachedEngines:
    """Remove damaged engines, and the least recently used ones beyond a size.

    Args:
        max_size: what may stay, such as "5G"; None: the cache's own limit.
        everything: remove every engine.

    Returns:
        What was removed.

    Raises:
        InputError: ``max_size`` is not a size, or both are given.
        EnvironmentProblem: the cache cannot be written, or others could write to it.
    """
    if everything and max_size is not None:
        raise InputError(f"--all removes every engine, so --max-size {max_size} means nothing; give one of the two")
    cache = EngineCache()
    limit = 0 if everything else cache.max_bytes if max_size is None else bytes_of(max_size)
    removed = cache.prune(limit) if cache.root.is_dir() else ()
    return CachedEngines(cache.root, limit, removed)
