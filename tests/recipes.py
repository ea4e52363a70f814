"""Recipes in a line."""

from typing import Any

from qdm_deploy.artifacts.recipe import Recipe

_KEYS = {
    **{name: (f"calibration.{name}",) for name in ("strategy", "samples", "count", "mean", "spread")},
    **{
        name: (f"activations.{name}",)
        for name in ("zero_offset", "step_bins", "gain_ratio", "channel_factors", "concat_scales", "branch_ratio")
    },
    **{name: (f"weights.{name}",) for name in ("bits", "reconstruct", "iterations", "upsample_phases")},
    "calibration_steps": ("calibration.steps",),
    "ranges": ("activations.ranges", "weights.ranges"),
}


def recipe_of(**values: Any) -> Recipe:
    """The default recipe with other values, by the last word of their keys; ``ranges`` are those of both sections."""
    return Recipe().with_keys({key: value for name, value in values.items() for key in _KEYS.get(name, (name,))})
