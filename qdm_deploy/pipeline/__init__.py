"""The Python API: checkpoint to bundle, bundle to pictures. Importing it loads no stage; calling it does."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qdm_deploy.pipeline.bundle_from_checkpoint import build
    from qdm_deploy.pipeline.comparison import Comparison, compare
    from qdm_deploy.pipeline.engine import CachedEngines, EngineResult, build_engine, cached_engines, prune_engines
    from qdm_deploy.pipeline.evaluate_options import EvaluateOptions
    from qdm_deploy.pipeline.evaluation import evaluate
    from qdm_deploy.pipeline.images_from_bundle import GenerateResult, generate
    from qdm_deploy.pipeline.inspection import Inspection, inspect
    from qdm_deploy.pipeline.options import BuildOptions, CompareOptions, GenerateOptions
    from qdm_deploy.pipeline.publish import BuildResult
    from qdm_deploy.pipeline.service import ServeOptions, serve
    from qdm_deploy.pipeline.triton_repository import TritonExport, export_triton
    from qdm_deploy.pipeline.verification import Verification, verify

__all__ = [
    "BuildOptions",
    "BuildResult",
    "CachedEngines",
    "CompareOptions",
    "Comparison",
    "EngineResult",
    "EvaluateOptions",
    "GenerateOptions",
    "GenerateResult",
    "Inspection",
    "ServeOptions",
    "TritonExport",
    "Verification",
    "build",
    "build_engine",
    "cached_engines",
    "compare",
    "evaluate",
    "export_triton",
    "generate",
    "inspect",
    "prune_engines",
    "serve",
    "verify",
]

_HOME = {
    "BuildOptions": "options",
    "BuildResult": "publish",
    "CachedEngines": "engine",
    "CompareOptions": "options",
    "Comparison": "comparison",
    "EngineResult": "engine",
    "EvaluateOptions": "evaluate_options",
    "GenerateOptions": "options",
    "GenerateResult": "images_from_bundle",
    "Inspection": "inspection",
    "ServeOptions": "service",
    "TritonExport": "triton_repository",
    "Verification": "verification",
    "build": "bundle_from_checkpoint",
    "build_engine": "engine",
    "cached_engines": "engine",
    "compare": "comparison",
    "evaluate": "evaluation",
    "export_triton": "triton_repository",
    "generate": "images_from_bundle",
    "inspect": "inspection",
    "prune_engines": "engine",
    "serve": "service",
    "verify": "verification",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
