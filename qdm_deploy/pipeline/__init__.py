"""The Python API: checkpoint to bundle, bundle to pictures. Importing it loads no stage; calling it does."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qdm_deploy.artifacts.recipe import Recipe
    from qdm_deploy.building.bundle_from_checkpoint import build
    from qdm_deploy.building.engine_audit import (
        CachedEngines,
        EngineResult,
        build_engine,
        cached_engines,
        prune_engines,
    )
    from qdm_deploy.building.options import BuildOptions
    from qdm_deploy.building.publish import BuildResult
    from qdm_deploy.building.recipe import list_recipes, read_recipe, write_recipe
    from qdm_deploy.evaluate.evaluation import evaluate
    from qdm_deploy.evaluate.options import EvaluateOptions
    from qdm_deploy.pipeline.comparison import Comparison, compare
    from qdm_deploy.pipeline.images_from_bundle import GenerateResult, generate
    from qdm_deploy.pipeline.inspection import Inspection, inspect
    from qdm_deploy.pipeline.options import CompareOptions, GenerateOptions
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
    "Recipe",
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
    "list_recipes",
    "prune_engines",
    "read_recipe",
    "serve",
    "verify",
    "write_recipe",
]

_HOME = {
    "BuildOptions": "building.options",
    "BuildResult": "building.publish",
    "CachedEngines": "building.engine_audit",
    "CompareOptions": "pipeline.options",
    "Comparison": "pipeline.comparison",
    "EngineResult": "building.engine_audit",
    "EvaluateOptions": "evaluate.options",
    "GenerateOptions": "pipeline.options",
    "GenerateResult": "pipeline.images_from_bundle",
    "Inspection": "pipeline.inspection",
    "Recipe": "artifacts.recipe",
    "ServeOptions": "pipeline.service",
    "TritonExport": "pipeline.triton_repository",
    "Verification": "pipeline.verification",
    "build": "building.bundle_from_checkpoint",
    "build_engine": "building.engine_audit",
    "cached_engines": "building.engine_audit",
    "compare": "pipeline.comparison",
    "evaluate": "evaluate.evaluation",
    "export_triton": "pipeline.triton_repository",
    "generate": "pipeline.images_from_bundle",
    "inspect": "pipeline.inspection",
    "list_recipes": "building.recipe",
    "prune_engines": "building.engine_audit",
    "read_recipe": "building.recipe",
    "serve": "pipeline.service",
    "verify": "pipeline.verification",
    "write_recipe": "building.recipe",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"qdm_deploy.{_HOME[name]}"), name)
