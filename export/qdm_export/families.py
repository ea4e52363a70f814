"""What a diffusers pipeline class adds to the files in its folder: which it needs, and what its constructor changes.

A class that is not listed is refused. Stable Diffusion's classes overrule options of old scheduler and U-Net files
without a word in the files (diffusers' ``pipeline_stable_diffusion.py``, ``__init__``); whoever reads the JSON alone
gets other timesteps, clipped latents or pictures of 256 pixels.
"""

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qdm_deploy.errors import ModelError

__all__ = ["FAMILIES", "Family", "family_of"]

_SAMPLE_SIZE = 64  # of every Stable Diffusion of that time


@dataclass(frozen=True)
class Family:
    """A pipeline class.

    Attributes:
        decoder: folder of what makes pictures of its latents; None where it denoises pixels.
        text: whether prompts go through ``text_encoder/`` and ``tokenizer/``.
        overrules: whether its constructor changes options of old files, as Stable Diffusion's does.
    """

    decoder: str | None = None
    text: bool = False
    overrules: bool = False

    def scheduler_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The scheduler's options as the pipeline runs it."""
        import diffusers

        changed = dict(config)
        kind = getattr(diffusers, str(config.get("_class_name")), None)
        if self.overrules and inspect.isclass(kind):
            options = inspect.signature(kind.__init__).parameters
            changed |= {name: value for name, value in (("steps_offset", 1), ("clip_sample", False)) if name in options}
        return changed

    def unet_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The U-Net's options as the pipeline runs it."""
        size, version = config.get("sample_size"), str(config.get("_diffusers_version", ""))
        is_old = re.match(r"0\.[0-8]\.", version) is not None
        if self.overrules and is_old and isinstance(size, int) and size < _SAMPLE_SIZE:
            return {**config, "sample_size": _SAMPLE_SIZE}
        return dict(config)


_PIXELS = Family()
_STABLE_DIFFUSION = Family(decoder="vae", text=True, overrules=True)
FAMILIES: Mapping[str, Family] = {
    "DDPMPipeline": _PIXELS,
    "DDIMPipeline": _PIXELS,
    "LDMPipeline": Family(decoder="vqvae"),
    "StableDiffusionPipeline": _STABLE_DIFFUSION,
    "StableDiffusionImg2ImgPipeline": _STABLE_DIFFUSION,
    "StableDiffusionInpaintPipeline": _STABLE_DIFFUSION,
    "LatentConsistencyModelPipeline": Family(decoder="vae", text=True),
    "StableDiffusionXLPipeline": Family(decoder="vae", text=True),
    "StableDiffusionXLImg2ImgPipeline": Family(decoder="vae", text=True),
    "StableDiffusionXLInpaintPipeline": Family(decoder="vae", text=True),
}


def family_of(model_index: Mapping[str, Any]) -> Family:
    """The family of a folder; one without ``model_index.json`` denoises pixels.

    Raises:
        ModelError: its pipeline class is unknown.
    """
    name = model_index.get("_class_name")
    if not model_index:
        return _PIXELS
    if not isinstance(name, str) or name not in FAMILIES:
        raise ModelError(
            f"model_index.json names the pipeline {name!r}; supported are {', '.join(sorted(FAMILIES))}. "
            "Give the folder of its U-Net alone to quantize that"
        )
    return FAMILIES[name]
