"""U-Nets of the sizes that people deploy, with random weights: speed, memory and size do not depend on the values.

Their weights are not shipped, and cannot be downloaded where the benchmarks run. What is not named here is diffusers'
default: LDM-4's architecture for ``UNet2DModel``, Stable Diffusion 1.x's for ``UNet2DConditionModel``.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel, UNet2DModel

# Nobody deploys it: it shows in seconds that a script runs.
_TINY = {
    "sample_size": 16,
    "block_out_channels": [32, 64],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": 32,
}
# google/ddpm-cifar10-32: the U-Net of Ho et al. (2020) for CIFAR-10, 35.7 M parameters.
_CIFAR10 = {
    "sample_size": 32,
    "block_out_channels": [128, 256, 256, 256],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-06,
}
# CompVis/ldm-celebahq-256: LDM-4 (Rombach et al. 2022), unconditional, 274 M parameters.
_LDM4 = {"sample_size": 64, "attention_head_dim": 32}
# runwayml/stable-diffusion-v1-5: 860 M parameters, text by cross-attention.
_SD15 = {"sample_size": 64, "cross_attention_dim": 768}
RANDOM_MODELS: Mapping[str, tuple[type[UNet2DModel | UNet2DConditionModel], dict[str, Any]]] = MappingProxyType(
    {
        "tiny": (UNet2DModel, _TINY),
        "cifar10": (UNet2DModel, _CIFAR10),
        "ldm4": (UNet2DModel, _LDM4),
        "sd15": (UNet2DConditionModel, _SD15),
    }
)


def random_model(name: str, folder: Path) -> Path:
    """Write a diffusers folder of that architecture, seed 0; returns it."""
    kind, config = RANDOM_MODELS[name]
    torch.manual_seed(0)
    kind(**config).save_pretrained(folder / "unet", max_shard_size="20GB")
    DDPMScheduler(clip_sample=True).save_pretrained(folder / "scheduler")
    return folder
