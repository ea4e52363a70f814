"""TensorRT engines of a bundle: build, audit, cache."""

from dataclasses import dataclass
from pathlib import Path

from qdm_deploy.artifacts.bundle import Bundle
from qdm_deploy.artifacts.plan import QuantizationPlan
from qdm_deploy.engines.audit import PlannedLayer
from qdm_deploy.engines.engine import Engine, engine_from_onnx
from qdm_deploy.engines.request import BatchProfile
from qdm_deploy.progress import SILENT, Progress
from qdm_deploy.report.model import EngineRow

__all__ = ["EngineResult", "audit_row", "build_engine"]

_DEFAULT_SM = "8.9"


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
    progress: Progress = SILENT,
) -> EngineResult:
    """Build the engine of a bundle, or find it in the cache.

    Args:
        bundle: the bundle's folder.
        backend: "tensorrt-rtx" (needs no GPU) or "tensorrt" (builds for the GPU of this machine).
        sm: compute capability, such as "8.9"; None: 8.9 for TensorRT-RTX, the GPU at hand for TensorRT.
        profile: smallest, best and largest batch.
        progress: where to report.

    Raises:
        InputError: an unknown compute capability, or batch sizes out of order.
        BundleError: the bundle is damaged or has no tensorrt graph.
        EngineError: the build failed.
    """
    batches = BatchProfile(*profile)
    opened = Bundle.open(bundle)
    plan = QuantizationPlan.load(opened.file("unet/plan.json").parent)
    row, engine = audit_row(opened.graph("tensorrt"), plan, backend=backend, sm=sm, profile=batches, progress=progress)
    return EngineResult(row, engine.path, engine.log, engine.from_cache)


def audit_row(
    graph: Path,
    plan: QuantizationPlan,
    *,
    backend: str,
    sm: str | None,
    profile: BatchProfile | None = None,
    progress: Progress = SILENT,
) -> tuple[EngineRow, Engine]:
    """Build the engine of a ``tensorrt`` graph and hold it against the plan that the graph was emitted from."""
    planned = [
        PlannedLayer(item.name, "convolution" if item.layer.kind == "conv" else "gemm") for item in plan.quantized
    ]
    # The verdict reports what is not INT8; an engine that fails its audit is still worth looking at.
    engine = engine_from_onnx(graph, backend=backend, sm=sm, profile=profile, planned=(), progress=progress)
    failures = engine.audit.failures(planned)
    row = EngineRow(
        backend=backend,
        sm=sm or (_DEFAULT_SM if backend == "tensorrt-rtx" else "this GPU"),
        planned=len(planned),
        int8=len(planned) - len(failures),
        kernels=engine.audit.summary(),
        build_seconds=engine.build_seconds,
        failures=tuple(f"{failure.name}: {failure.reason}" for failure in failures),
    )
    return row, engine
