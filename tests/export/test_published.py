"""Every configuration that people ship goes through whole: exported, planned, rewritten for each target, and run.

Of the published configurations, what makes each of them itself is kept (block types, layers, transformer depths, heads,
kinds of projections, added inputs); widths, sample sizes and states are small, and weights are random. What differs
from Stable Diffusion 1.5 or XL in one thing has fewer levels and layers. Sources: the config.json files of the
repositories that are named.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from qdm_calibration.collect import collect_calibration_set
from qdm_calibration.plan import PlanOptions, make_plan
from qdm_calibration.statistics import collect_statistics
from qdm_calibration.timesteps import SamplingPlan
from qdm_deploy.artifacts.plan import TARGETS
from qdm_deploy.building.checks import run_graph
from qdm_deploy.metrics.error import sqnr_db
from qdm_deploy.samplers import NoiseSchedule, step_table
from qdm_deploy.samplers.conditioning import Conditioning
from qdm_deploy.samplers.random_inputs import random_inputs
from qdm_deploy.samplers.sampling import Sampling
from qdm_export.float_graph import export_float_graph, save_graph
from qdm_export.step_graph import StepGraph
from qdm_export.targets import emit, emit_float
from qdm_export.topology import topology_of
from qdm_export.unet import load_checkpoint

_SD_BLOCKS: dict[str, Any] = {
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "block_out_channels": (16, 32, 32, 32),
}
_SD: dict[str, Any] = {
    **_SD_BLOCKS, "sample_size": 16, "in_channels": 4, "out_channels": 4, "layers_per_block": 2,
    "norm_num_groups": 4, "norm_eps": 1e-5, "attention_head_dim": 4, "cross_attention_dim": 24,
}  # fmt: skip
_SDXL: dict[str, Any] = {
    "sample_size": 16, "in_channels": 4, "out_channels": 4, "layers_per_block": 2, "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (16, 32, 32), "transformer_layers_per_block": (1, 1, 2), "attention_head_dim": (2, 4, 4),
    "cross_attention_dim": 24, "use_linear_projection": True, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 16 + 6 * 8,
}  # fmt: skip

# Half the levels and one layer: for what is Stable Diffusion 1.5 but for one thing.
_SMALL: dict[str, Any] = {
    **_SD,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
}

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    # google/ddpm-cifar10-32
    "ddpm-cifar10": {
        "kind": "UNet2DModel", "sample_size": 16, "in_channels": 3, "out_channels": 3, "layers_per_block": 2,
        "block_out_channels": (16, 32, 32, 32), "norm_num_groups": 4, "norm_eps": 1e-6, "attention_head_dim": None,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "act_fn": "silu",
    },
    # CompVis/ldm-celebahq-256: LDM-4
    "ldm-4": {
        "kind": "UNet2DModel", "sample_size": 16, "in_channels": 3, "out_channels": 3, "layers_per_block": 2,
        "block_out_channels": (16, 32, 32, 32), "norm_num_groups": 4, "attention_head_dim": 8,
        "down_block_types": ("DownBlock2D",) + ("AttnDownBlock2D",) * 3,
        "up_block_types": ("AttnUpBlock2D",) * 3 + ("UpBlock2D",),
    },
    # cin256-v2 of CompVis/latent-diffusion: a label is one token of states
    "ldm-class-conditional": {
        "kind": "UNet2DConditionModel", "sample_size": 16, "in_channels": 3, "out_channels": 3, "layers_per_block": 1,
        "block_out_channels": (16, 32, 32), "norm_num_groups": 4, "attention_head_dim": 1, "cross_attention_dim": 24,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3, "up_block_types": ("CrossAttnUpBlock2D",) * 3,
    },
    # stable-diffusion-v1-5: attention_head_dim counts heads, convolutions around the transformers
    "sd-1.5": {"kind": "UNet2DConditionModel", **_SD},
    # stabilityai/stable-diffusion-2-1: linear projections, heads by level
    "sd-2.1": {
        "kind": "UNet2DConditionModel", **_SMALL, "attention_head_dim": (2, 4), "use_linear_projection": True,
        "dual_cross_attention": False, "upcast_attention": True,
    },
    # stabilityai/stable-diffusion-xl-base-1.0
    "sdxl-base": {"kind": "UNet2DConditionModel", **_SDXL},
    # stabilityai/stable-diffusion-xl-refiner-1.0: five embedded numbers, four levels
    "sdxl-refiner": {
        "kind": "UNet2DConditionModel", **_SDXL,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (16, 32, 32, 32), "transformer_layers_per_block": 2, "attention_head_dim": (2, 4, 4, 4),
        "layers_per_block": 1, "projection_class_embeddings_input_dim": 16 + 5 * 8,
    },
    # SimianLuo/LCM_Dreamshaper_v7: SD 1.5 that is told its guidance
    "lcm": {"kind": "UNet2DConditionModel", **_SMALL, "time_cond_proj_dim": 20},
    # segmind/SSD-1B: SDXL without some transformers and without the middle's
    "ssd-1b": {
        "kind": "UNet2DConditionModel", **_SDXL, "mid_block_type": "UNetMidBlock2D",
        "transformer_layers_per_block": ((0, 0), (2, 2), (3, 3)),
        "reverse_transformer_layers_per_block": ((3, 3, 2), (2, 1, 1), (0, 0, 0)),
    },
    # segmind/tiny-sd: three levels, one layer, no middle
    "tiny-sd": {
        "kind": "UNet2DConditionModel", **_SD, "layers_per_block": 1, "mid_block_type": None,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3, "up_block_types": ("CrossAttnUpBlock2D",) * 3,
        "block_out_channels": (16, 32, 32),
    },
    # runwayml/stable-diffusion-inpainting: mask and masked latents beside the sample
    "sd-inpainting": {"kind": "UNet2DConditionModel", **_SMALL, "in_channels": 9},
}  # fmt: skip


def write_published(name: str, folder: Path) -> Path:
    """A diffusers folder with that configuration's U-Net and scheduler."""
    import diffusers

    torch.manual_seed(sorted(CONFIGURATIONS).index(name))
    config = dict(CONFIGURATIONS[name])
    unet = getattr(diffusers, config.pop("kind"))(**config)
    with torch.no_grad():
        unet.conv_out.weight.mul_(3)
    unet.save_pretrained(folder / "unet")
    diffusers.DDIMScheduler(clip_sample=False).save_pretrained(folder / "scheduler")
    index: dict[str, Any] = {"_class_name": "DDPMPipeline"}
    if name == "sdxl-refiner":
        index["requires_aesthetics_score"] = True
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def states_of(interface: Any, count: int, seed: int) -> dict[str, Any]:
    """Random conditions of ``count`` images."""
    rng = np.random.default_rng(seed)
    return {spec.name: rng.normal(size=(count, *spec.row_shape)).astype(np.float32) for spec in interface.conditions}


def how_many(unet: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in unet.modules())


def plan_of(checkpoint: Any, graph: Any) -> Any:
    """A plan of little calibration: what is asked here is which layers and places there are."""
    denoiser = checkpoint.denoiser
    table = step_table(NoiseSchedule.from_config(checkpoint.scheduler_config), "ddim", 2)
    conditions = Conditioning(states_of(denoiser.interface, 2, seed=1)) if denoiser.conditional else Conditioning()
    sampling = Sampling(table, range(2), conditions)
    calibration = collect_calibration_set(checkpoint.unet, denoiser, sampling, SamplingPlan(samples=2, steps=2))
    topology = topology_of(graph)
    statistics = collect_statistics(checkpoint.unet, topology, calibration, denoiser.num_train_timesteps)
    return make_plan(checkpoint.unet, topology, statistics, PlanOptions(ranges="minmax", step_bins=2))


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_published_configuration_goes_through_whole(name: str, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(write_published(name, tmp_path / "model"))
    graph = export_float_graph(checkpoint)
    inputs = random_inputs(checkpoint.denoiser, 3, seed=5)
    step = StepGraph(checkpoint.unet, checkpoint.denoiser)
    with torch.inference_mode():
        following, x0, _ = step(*(torch.from_numpy(inputs[key]) for key in step.interface.input_names))
    save_graph(emit_float(graph).model, tmp_path / "float.onnx")
    for backend in ("onnxruntime", "openvino"):
        found = run_graph(backend, tmp_path / "float.onnx", inputs)
        assert sqnr_db(following.numpy(), found["next_sample"]) > 80, backend
        assert sqnr_db(x0.numpy(), found["x0"]) > 80, backend

    unet, plan = checkpoint.unet.unet, plan_of(checkpoint, graph)
    layers, norms, blocks = len(plan.quantized), how_many(unet, nn.GroupNorm), how_many(unet, ResnetBlock2D)
    attentions = how_many(unet, Attention)
    crossing = sum(isinstance(item, Attention) and bool(item.is_cross_attention) for item in unet.modules())
    assert layers > len(plan.layers) / 3
    for target in TARGETS:
        emission = emit(graph, plan, target)
        counts = {each.name: (each.done, each.expected) for each in emission.rewrites}
        assert not any(each.missed for each in emission.rewrites), target
        assert counts["weights"] == counts["inputs"] == (layers, layers)
        if target == "tensorrt":
            assert counts.get("attention heads", (0, 0)) == (attentions - crossing,) * 2
            continue
        assert counts["norms"] == (norms, norms)
        assert counts["centred projections"] == (blocks, blocks)
        if target == "openvino":
            assert counts.get("attention layout", (0, 0)) == (attentions, attentions)
            assert counts["SiLU"] == (2 * blocks + 1, 2 * blocks + 1)
        save_graph(emission.model, tmp_path / f"{target}.onnx", weights=f"{target}.data")
        found = run_graph(target, tmp_path / f"{target}.onnx", inputs)
        assert 8 < sqnr_db(x0.numpy(), found["x0"]) < 80, target
