"""Latents become pictures: the exported decoder against diffusers, alone and behind the step loop."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, UNet2DModel, VQModel
from PIL import Image

from qdm_deploy.artifacts.bundle import Bundle
from qdm_deploy.components.decoder import LatentDecoder
from qdm_deploy.errors import CheckFailed, InputError, ModelError
from qdm_deploy.pipeline import BuildOptions, GenerateOptions, build, generate
from qdm_deploy.samplers.noise import initial_noise
from qdm_export.decoder import load_decoder, save_decoder

BLOCKS: dict[str, Any] = {"block_out_channels": (16, 32), "norm_num_groups": 8}


def autoencoder(name: str) -> Any:
    """Random, with a codebook as wide as what is looked up in it."""
    torch.manual_seed(3)
    if name == "AutoencoderTiny":
        return AutoencoderTiny(
            encoder_block_out_channels=(16, 16, 16), decoder_block_out_channels=(16, 16, 16),
            num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1),
        )  # fmt: skip
    down, up = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
    if name == "AutoencoderKL":
        return AutoencoderKL(down_block_types=down, up_block_types=up, latent_channels=5, **BLOCKS)
    made = VQModel(down_block_types=down, up_block_types=up, num_vq_embeddings=64, scaling_factor=0.5, **BLOCKS)
    torch.nn.init.normal_(made.quantize.embedding.weight)
    return made


@pytest.fixture(scope="module")
def decoders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Any, Path]]:
    """diffusers' autoencoder, what it takes, and its graph, by class."""
    made: dict[str, tuple[Any, Any, Path]] = {}

    def of(name: str) -> tuple[Any, Any, Path]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            autoencoder(name).eval().save_pretrained(folder / "vae")
            net = load_decoder(folder, {"vae": ["diffusers", name]})
            assert net is not None
            save_decoder(net, folder / "vae_decoder")
            # The export changes the module that it was given.
            original = type(net.autoencoder).from_pretrained(folder / "vae").eval()
            made[name] = original, net.spec, folder / "vae_decoder"
        return made[name]

    return of


def psnr_db(a: Any, b: Any) -> float:
    return float(10 * np.log10(4 / max(float(np.mean((a.astype(np.float64) - b) ** 2)), 1e-30)))


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(("name", "factor"), [("AutoencoderKL", 2), ("VQModel", 2), ("AutoencoderTiny", 4)])
def test_pictures_equal_those_of_diffusers(decoders: Any, name: str, factor: int, backend: str) -> None:
    original, spec, folder = decoders(name)
    assert spec.factor == factor
    with LatentDecoder(folder / "model.onnx", spec, backend=backend, threads=1) as decoder:
        for batch, height, width in ((1, 8, 8), (3, 6, 12)):
            shape = (batch, spec.latent_channels, height, width)
            latents = np.random.default_rng(0).normal(size=shape).astype(np.float32)
            with torch.inference_mode():
                expected = original.decode(torch.from_numpy(latents) / spec.scaling_factor).sample.numpy()
            found = decoder.decode(latents)
            assert found.shape == expected.shape == (batch, 3, height * factor, width * factor)
            assert psnr_db(expected, found) > 80


def test_tiles_are_those_of_diffusers(decoders: Any) -> None:
    original, spec, folder = decoders("AutoencoderKL")
    latents = np.random.default_rng(1).normal(size=(1, spec.latent_channels, 20, 14)).astype(np.float32)
    original.tile_latent_min_size, original.tile_sample_min_size = 8, 16
    with torch.inference_mode():
        expected = original.tiled_decode(torch.from_numpy(latents) / spec.scaling_factor).sample.numpy()
    with LatentDecoder(folder / "model.onnx", spec, threads=1, whole=16, tile=16) as decoder:
        assert psnr_db(expected, decoder.decode(latents)) > 80


def test_the_stage_that_failed_is_named(decoders: Any) -> None:
    _, spec, folder = decoders("AutoencoderKL")
    with LatentDecoder(folder / "model.onnx", spec, threads=1) as decoder:
        latents = np.zeros((2, spec.latent_channels, 4, 4), np.float32)
        latents[1, 0, 0, 0] = np.nan
        with pytest.raises(CheckFailed, match="1 of 2 latents are NaN or infinite, the first number 1"):
            decoder.decode(latents)
        latents[1, 0, 0, 0] = np.float32(1e38)
        with pytest.raises(CheckFailed, match="1 of 2 pictures that the decoder made are NaN"):
            decoder.decode(latents)
        with pytest.raises(InputError, match=r"the decoder takes float32 \[N, 5, h, w\]"):
            decoder.decode(np.zeros((1, 4, 4, 4), np.float32))


def test_other_autoencoders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text('{"_class_name": "AutoencoderDC"}')
    with pytest.raises(ModelError, match="'AutoencoderDC'; decoders of the classes AutoencoderKL, AutoencoderTiny"):
        load_decoder(tmp_path, {"vae": ["diffusers", "AutoencoderDC"]})


def test_an_old_file_without_scaling_has_the_first_models(tmp_path: Path) -> None:
    autoencoder("AutoencoderKL").save_pretrained(tmp_path / "vae")
    path = tmp_path / "vae" / "config.json"
    config = json.loads(path.read_text())
    del config["scaling_factor"]
    path.write_text(json.dumps(config))
    net = load_decoder(tmp_path, {"vae": ["diffusers", "AutoencoderKL"]})
    assert net is not None
    assert net.spec.scaling_factor == 0.18215


def test_a_latent_pipeline_equals_diffusers(tmp_path: Path, quick_options: Any) -> None:
    """LDM as diffusers runs it: DDIM on three channels of latents, the codebook, the pictures."""
    torch.manual_seed(4)
    unet = UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(16, 32),
        norm_num_groups=8, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip
    vqvae = autoencoder("VQModel").eval()
    scheduler = DDIMScheduler(
        beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", clip_sample=False, timestep_spacing="leading"
    )
    model = tmp_path / "ldm"
    unet.save_pretrained(model / "unet")
    vqvae.save_pretrained(model / "vqvae")
    scheduler.save_pretrained(model / "scheduler")
    (model / "model_index.json").write_text(
        json.dumps({"_class_name": "LDMPipeline", "vqvae": ["diffusers", "VQModel"]})
    )
    bundle = build(BuildOptions(**{**quick_options, "out": tmp_path / "ldm.qdm", "model": str(model)})).bundle
    opened = Bundle.open(bundle)
    assert opened.pipeline.makes == "latents"
    assert opened.pipeline.picture_shape == (3, 16, 16)

    latents = torch.from_numpy(initial_noise([5, 6], (3, 8, 8)))
    scheduler.set_timesteps(6)
    with torch.inference_mode():
        for timestep in scheduler.timesteps:
            latents = scheduler.step(unet(latents, timestep).sample, timestep, latents).prev_sample
        expected = vqvae.decode(latents / vqvae.config.scaling_factor).sample.numpy()
    for backend in ("onnxruntime", "openvino"):
        out = tmp_path / backend
        made = generate(
            GenerateOptions(
                bundle=bundle, out=out, count=2, seed=5, steps=6, backend=backend, precision="float", threads=1
            )
        )
        found = np.stack([np.asarray(Image.open(path)) for path in made.images]).astype(np.float64)
        wanted = np.clip(expected.transpose(0, 2, 3, 1) / 2 + 0.5, 0, 1) * 255
        # Half a step of 8 bits is the most that may lie between them.
        assert np.abs(found - wanted).max() < 0.51
