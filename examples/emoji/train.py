"""Train a small Stable Diffusion model that draws emoji: its VAE, then its U-Net together with its text encoder.

    python examples/emoji/train.py vae DATA WORK --steps 40000
    python examples/emoji/train.py unet DATA WORK --steps 270000 --decay-steps 50000
    python examples/emoji/train.py export DATA WORK --out PIPELINE

DATA is the folder that `pack.py` writes. WORK holds the state: live and averaged weights, the optimizer's moments and
counters, saved every ten minutes and when the training is interrupted; the same command goes on from there and ends in
the same weights as one that was never stopped. The rate is constant after its warm-up and falls to zero over the last
--decay-steps. Needs the build extra and transformers.
"""

import argparse
import math
import shutil
from pathlib import Path

import numpy as np
import torch
from data import STYLES, draw_caption, full_caption, read_captions, read_pictures, rows_of
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from training import Training, generators_at, rows_at, run
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

UNET = {
    "sample_size": 16,
    "block_out_channels": (96, 160, 224),
    "attention_head_dim": (3, 5, 7),
    "layers_per_block": 1,
    "cross_attention_dim": 256,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3,
    "up_block_types": ("CrossAttnUpBlock2D",) * 3,
}
VAE = {
    "sample_size": 128,
    "block_out_channels": (32, 64, 128, 128),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 16,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "scaling_factor": 1.0,
}
TEXT_ENCODER = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
SHEET = ("red apple", "grinning face", "cat face", "red heart", "automobile", "pizza", "star", "evergreen tree")


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    marks = {f"{mark}_token_id": getattr(tokenizer, f"{mark}_token_id") for mark in ("bos", "eos", "pad")}
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), max_position_embeddings=77, projection_dim=256, **TEXT_ENCODER, **marks
        )
    )


def scale(pictures: Tensor, device: torch.device) -> Tensor:
    """Bytes as numbers in -1..1."""
    return (pictures.to(device).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Means of the latents, float32 [N, 4, H / 8, W / 8] on the CPU, of uint8 pictures [N, 3, H, W]."""
    parts = []
    for part in pictures.split(8):
        parts.append(vae.encode(scale(part, vae.device)).latent_dist.mean.cpu())
    return torch.cat(parts).contiguous()


def read_vae(options: argparse.Namespace) -> AutoencoderKL:
    """The trained VAE, float32."""
    vae = AutoencoderKL.from_pretrained(options.work / "vae", dtype=torch.float32, low_cpu_mem_usage=False)
    return vae.to(options.device, memory_format=torch.channels_last)


def read_latents(options: argparse.Namespace, count: int) -> Tensor:
    """Latents of all pictures, float32 [N, 4, 16, 16]; encoded on first use and kept in WORK."""
    kept = options.work / "latents.safetensors"
    if not kept.is_file():
        print("encoding the pictures", flush=True)
        vae = read_vae(options)
        save_file({"latents": encode(vae, read_pictures(options.data, list(range(count)))).half()}, kept)
    return load_file(kept)["latents"].float()


class TextToImage:
    """Loss and pictures of the U-Net and the text encoder, trained together on the VAE's latents."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, torch.device(options.device)
        self.captions = read_captions(options.data)
        self.seen, self.held_out = rows_of(self.captions, "train"), rows_of(self.captions, "held-out")
        self.latents = read_latents(options, len(self.captions))
        self.tokenizer = CLIPTokenizer.from_pretrained(options.data / "tokenizer")
        torch.manual_seed(options.seed)
        self.unet = UNet2DConditionModel(**UNET).to(self.device, memory_format=torch.channels_last)
        if options.compile:
            self.unet.compile()
        self.text_encoder = new_text_encoder(self.tokenizer).to(self.device)
        self.scheduler = DDIMScheduler(**SCHEDULER)
        self.alphas_cumprod = self.scheduler.alphas_cumprod.to(self.device)
        self.training = Training({"unet": self.unet, "text_encoder": self.text_encoder}, options.lr, options.average)

    def losses(self, rows: list[int], texts: list[str], draws: torch.Generator) -> Tensor:
        """Per picture the squared error of the predicted noise, weighted min(SNR, 5) / SNR (arXiv 2303.09556)."""
        strata = (torch.arange(len(rows)) + torch.rand(len(rows), generator=draws)) * (1000 / len(rows))
        timesteps = strata.long().clamp(max=999).to(self.device)
        x_0 = self.latents[rows].to(self.device)
        eps = torch.randn(x_0.shape, generator=draws).to(self.device)
        abar = self.alphas_cumprod[timesteps][:, None, None, None]
        x_t = (abar.sqrt() * x_0 + (1 - abar).sqrt() * eps).contiguous(memory_format=torch.channels_last)
        ids = self.tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.bfloat16):
            context = self.text_encoder(ids.to(self.device)).last_hidden_state
            predicted = self.unet(x_t, timesteps, context).sample
        abar = abar.flatten()
        weights = (5 * (1 - abar) / abar).clamp(max=1)
        return weights * (predicted.float() - eps).square().mean((1, 2, 3))

    def next_loss(self, step: int, samples: int) -> Tensor:
        """Mean loss of the batch of ``step``."""
        options = self.options
        numbers, draws = generators_at(step, options.seed)
        rows = [self.seen[at] for at in rows_at(samples, options.batch, len(self.seen), options.seed)]
        return self.losses(rows, [draw_caption(self.captions[row], numbers) for row in rows], draws).mean()

    @torch.no_grad()
    def measure(self, count: int = 256) -> dict[str, float]:
        """Losses on held-out pairs, with the right caption and with another concept's.

        Noise and timesteps are the same each time. The gap between the two says how far the text steers.
        """
        totals = {"held_out": 0.0, "held_out_wrong": 0.0}
        rows = self.held_out[:: max(1, len(self.held_out) // count)][:count]
        others = rows[1:] + rows[:1]
        for name, named in (("held_out", rows), ("held_out_wrong", others)):
            texts = [
                full_caption(self.captions[row]["style"], self.captions[other]["label"])
                for row, other in zip(rows, named, strict=True)
            ]
            for first in range(0, len(rows), 32):
                part = slice(first, first + 32)
                draws = torch.Generator().manual_seed(first)
                totals[name] += self.losses(rows[part], texts[part], draws).sum().item()
        return {name: total / len(rows) for name, total in totals.items()}

    def draw(self, path: Path) -> None:
        """A sheet of samples, a style per row."""
        write_sheet(self.pipeline(read_vae(self.options)), path)

    def pipeline(self, vae: AutoencoderKL) -> StableDiffusionPipeline:
        """The networks as they are now, as a pipeline."""
        return StableDiffusionPipeline(
            vae=vae, text_encoder=self.text_encoder, tokenizer=self.tokenizer, unet=self.unet, scheduler=self.scheduler,
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip


def write_sheet(pipeline: StableDiffusionPipeline, path: Path) -> None:
    """25 steps with guidance 4 of every style (rows) and of `SHEET` (columns); one seed per column."""
    pipeline.set_progress_bar_config(disable=True)
    rows = []
    for style in STYLES:
        prompts = [full_caption(style, label) for label in SHEET]
        seeds = [torch.Generator().manual_seed(seed) for seed in range(len(SHEET))]
        pictures = pipeline(prompts, num_inference_steps=25, guidance_scale=4.0, generator=seeds, output_type="np")
        rows.append(np.concatenate(list(pictures.images), axis=1))
    Image.fromarray((np.concatenate(rows) * 255).round().astype(np.uint8)).save(path)


class Autoencoder:
    """Loss and pictures of the VAE."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, torch.device(options.device)
        captions = read_captions(options.data)
        self.pictures = read_pictures(options.data, rows_of(captions, "train"))
        self.held_out = read_pictures(options.data, rows_of(captions, "held-out"))
        torch.manual_seed(options.seed)
        self.vae = AutoencoderKL(**VAE).to(self.device, memory_format=torch.channels_last)
        self.training = Training({"vae": self.vae}, options.lr, options.average)

    def next_loss(self, step: int, samples: int) -> Tensor:
        """L1 of the pixels, of their differences and of means of 4x4, and a little KL.

        Crops of half the side first, for speed; whole pictures over the last 15 % of --steps.
        """
        options, (numbers, draws) = self.options, generators_at(step, self.options.seed)
        rows = rows_at(samples, options.batch, len(self.pictures), options.seed)
        side = VAE["sample_size"] if step > 0.85 * options.steps else VAE["sample_size"] // 2
        top, left = numbers.integers(VAE["sample_size"] - side + 1, size=2)
        wanted = scale(self.pictures[rows, :, top : top + side, left : left + side], self.device)
        if numbers.random() < 0.5:
            wanted = wanted.flip(3)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=options.bfloat16):
            posterior = self.vae.encode(wanted).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=draws).to(self.device)
            made = self.vae.decode(posterior.mean + posterior.std * noise).sample
        error = made.float() - wanted
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        coarse = nn.functional.avg_pool2d(error, 4).abs().mean()
        return error.abs().mean() + edges + coarse + 1e-6 * posterior.kl().float().mean()

    @torch.no_grad()
    def reconstruct(self, pictures: Tensor) -> Tensor:
        """Reconstructions, uint8 like ``pictures``."""
        made = [
            self.vae.decode(self.vae.encode(scale(part, self.device)).latent_dist.mean).sample.cpu()
            for part in pictures.split(8)
        ]
        return ((torch.cat(made).clamp(-1, 1) + 1) * 127.5).round().byte()

    def measure(self, count: int = 64) -> dict[str, float]:
        """Mean PSNR in dB on held-out pictures."""
        wanted = self.held_out[:: max(1, len(self.held_out) // count)][:count]
        error = (self.reconstruct(wanted).float() - wanted.float()) / 255
        return {"psnr": (-10 * error.square().mean((1, 2, 3)).log10()).mean().item()}

    def draw(self, path: Path) -> None:
        """A sheet of held-out pictures above their reconstructions."""
        wanted = self.held_out[:: max(1, len(self.held_out) // 12)][:12]
        sheet = torch.cat([torch.cat(list(row), 2) for row in (wanted, self.reconstruct(wanted))], 1)
        Image.fromarray(sheet.permute(1, 2, 0).numpy()).save(path)


@torch.no_grad()
def normalize_latents(vae: AutoencoderKL, latents: Tensor) -> None:
    """Change ``vae`` so that each channel of its latents has mean 0 and deviation 1, as ``latents`` measure them.

    Pipelines scale latents but do not shift them, and white pages give them a large mean. What the encoder's last
    convolution subtracts and divides, the decoder's first undoes.
    """
    mean, deviation = (value.to(vae.device) for value in (latents.mean((0, 2, 3)), latents.std((0, 2, 3))))
    encoding, decoding = vae.quant_conv, vae.post_quant_conv
    channels = len(mean)
    encoding.weight[:channels] /= deviation[:, None, None, None]
    encoding.bias[:channels] = (encoding.bias[:channels] - mean) / deviation
    encoding.bias[channels:] -= 2 * deviation.log()  # the other half of the channels is the log variance
    decoding.bias += decoding.weight[:, :, 0, 0] @ mean
    decoding.weight *= deviation[None, :, None, None]


def go_on(training: Training, state: Path) -> None:
    """Load ``state`` if there is one."""
    if state.is_file():
        training.load(state)
        print(f"going on from step {training.step}", flush=True)


def train_vae(options: argparse.Namespace) -> None:
    if math.isinf(options.steps):
        raise SystemExit("the VAE's last steps see whole pictures: say how many there are with --steps")
    task = Autoencoder(options)
    state = options.work / "vae_state.safetensors"
    go_on(task.training, state)
    run(task.training, task.next_loss, task.measure, task.draw, state, options)
    if task.training.step < options.steps:
        print("not at its end yet: the same command goes on")
        return
    with task.training.averaged():
        normalize_latents(task.vae, encode(task.vae, task.pictures))
        task.vae.save_pretrained(options.work / "vae")
    (options.work / "latents.safetensors").unlink(missing_ok=True)


def train_unet(options: argparse.Namespace) -> None:
    task = TextToImage(options)
    state = options.work / "unet_state.safetensors"
    go_on(task.training, state)
    task.unet.train()
    task.text_encoder.train()
    run(task.training, task.next_loss, task.measure, task.draw, state, options)


def export(options: argparse.Namespace) -> None:
    """The averaged weights as a Stable Diffusion pipeline in float16, with its sources beside it."""
    if options.out is None:
        raise SystemExit("export writes a pipeline: name its folder with --out")
    state = options.work / "unet_state.safetensors"
    if not state.is_file():
        raise SystemExit(f"{state} is missing: train the U-Net first")
    task = TextToImage(options)
    task.training.load(state)
    with task.training.averaged():
        pipeline = task.pipeline(read_vae(options))
        write_sheet(pipeline, options.work / "samples.png")
        pipeline.to(torch.float16).save_pretrained(options.out)
    for name in ("tokenizer/vocab.json", "tokenizer/merges.txt", "ATTRIBUTION.md"):
        shutil.copy(options.data / name, options.out / name)
    print(f"{task.training.samples} samples; the pipeline is in {options.out}")


STAGES = {"vae": train_vae, "unet": train_unet, "export": export}
DEFAULTS = {"vae": {"lr": 5e-4, "batch": 12}, "unet": {"lr": 4e-4, "batch": 32}, "export": {"lr": 0.0, "batch": 1}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("data", type=Path, help="folder that pack.py wrote")
    parser.add_argument("work", type=Path, help="folder of the training's state")
    parser.add_argument("--out", type=Path, help="export: the pipeline folder to write")
    parser.add_argument("--steps", type=float, default=math.inf, help="end at this step")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="stop after so many minutes; it can go on later"
    )
    parser.add_argument("--lr", type=float, help="learning rate (vae 5e-4, unet 4e-4)")
    parser.add_argument("--warmup-steps", type=int, default=200)
    parser.add_argument("--decay-steps", type=int, default=0, help="the rate falls to zero over the last of --steps")
    parser.add_argument("--batch", type=int, help="vae 12, unet 32")
    parser.add_argument("--average", type=float, default=0.9995, help="decay of the averaged weights")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bfloat16", action="store_true", help="autocast; faster on GPUs and on CPUs with AMX")
    parser.add_argument("--compile", action="store_true", help="compile the U-Net; pays on GPUs")
    parser.add_argument("--save-minutes", type=float, default=10)
    parser.add_argument("--measure-minutes", type=float, default=15, help="of the process's own time")
    parser.add_argument("--sheet-minutes", type=float, default=90, help="of the process's own time")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name, value in DEFAULTS[options.stage].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.decay_steps and math.isinf(options.steps):
        parser.error("--decay-steps counts back from --steps: give both")
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    STAGES[options.stage](options)


if __name__ == "__main__":
    main()
