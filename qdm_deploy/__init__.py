"""INT8 deployment of diffusion U-Nets: ``from qdm_deploy import build, generate``. Importing it loads no stage."""

import os
from typing import TYPE_CHECKING, Any

# ONNX Runtime sends usage data unless this is set before it is first imported; it also leaves a device number and files
# in the user's cache. Whoever wants that can set it to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from qdm_deploy.pipeline import BuildOptions as BuildOptions
    from qdm_deploy.pipeline import GenerateOptions as GenerateOptions
    from qdm_deploy.pipeline import Recipe as Recipe
    from qdm_deploy.pipeline import build as build
    from qdm_deploy.pipeline import generate as generate
    from qdm_deploy.pipeline import read_recipe as read_recipe

__all__ = ["BuildOptions", "GenerateOptions", "Recipe", "build", "generate", "read_recipe"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from qdm_deploy import pipeline

    return getattr(pipeline, name)
