"""Train the demo model: a class-conditional DDPM on Fashion-MNIST, or on any folder of picture folders.

    python examples/train_ddpm.py FOLDER_WITH_IDX_FILES OUT_FOLDER --minutes 60
    python examples/train_ddpm.py PICTURES OUT_FOLDER --model MODEL_FOLDER --fresh --device cuda --steps 50000

The network's configuration and, unless --fresh, its first weights come from --model, a diffusers pipeline folder;
OUT_FOLDER becomes such a folder itself, with the averaged weights. State is saved as safetensors every few minutes
and when the training is interrupted; the same command goes on from there. Needs the build extra (torch, diffusers).
"""

import argparse
import json
import math
import os
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import read_pictures
from diffusers import UNet2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import qdm_deploy

EMBEDDED = Path(qdm_deploy.__file__).parent / "data" / "ddpm-fashion-mnist"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
STATE = "training_state.safetensors"


@dataclass
class Training:
    """Everything that a continued training needs; the step and the seconds spent are its clock."""

    unet: UNet2DModel
    optimizer: torch.optim.AdamW
    average: dict[str, Tensor]
    step: int = 0
    seconds: float = 0.0

    def save(self, path: Path) -> None:
        """Write weights, averages, moments and clock to ``path``, whole or not at all."""
        tensors = {f"weight.{name}": value.detach() for name, value in self.unet.named_parameters()}
        tensors |= {f"average.{name}": value for name, value in self.average.items()}
        for (name, _), moments in zip(self.unet.named_parameters(), self.optimizer.state.values(), strict=False):
            tensors |= {f"{key}.{name}": moments[key] for key in ("exp_avg", "exp_avg_sq")}
        clock = {"step": str(self.step), "seconds": str(self.seconds)}
        save_file({name: value.contiguous().cpu() for name, value in tensors.items()}, f"{path}.part", clock)
        os.replace(f"{path}.part", path)

    def load(self, path: Path) -> None:
        """Go on from what `save` wrote."""
        with safe_open(path, "pt") as file:
            self.step, self.seconds = int(file.metadata()["step"]), float(file.metadata()["seconds"])
        tensors = load_file(path)
        with torch.no_grad():
            for name, value in self.unet.named_parameters():
                value.copy_(tensors[f"weight.{name}"])
                self.average[name].copy_(tensors[f"average.{name}"])
                moments = {key: tensors[f"{key}.{name}"].to(value.device) for key in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[value] = {"step": torch.tensor(float(self.step)), **moments}

    def average_weights(self, rate: float = 0.999) -> None:
        """Exponential moving average; the first steps count less, so that it forgets where it began."""
        rate = min(rate, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, value in self.unet.named_parameters():
                self.average[name].lerp_(value.float(), 1 - rate)


def noisy(pictures: Tensor, timesteps: Tensor, alphas_cumprod: Tensor) -> tuple[Tensor, Tensor]:
    """x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps and eps, both [B, C, H, W] (DDPM, equation 4)."""
    eps = torch.randn_like(pictures)
    abar = alphas_cumprod[timesteps][:, None, None, None]
    return abar.sqrt() * pictures + (1 - abar).sqrt() * eps, eps


def train(training: Training, pictures: Tensor, labels: Tensor, options: argparse.Namespace, state: Path) -> None:
    device = torch.device(options.device)
    unet, null_label = training.unet, training.unet.config.num_class_embeds - 1
    pictures, labels = pictures.to(device), labels.to(device)
    schedule = json.loads((options.model / "scheduler" / "scheduler_config.json").read_text())
    betas = torch.linspace(schedule["beta_start"], schedule["beta_end"], schedule["num_train_timesteps"])
    alphas_cumprod = (1 - betas.double()).cumprod(0).float().to(device)
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=not options.float32)
    stopped = []
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, lambda *_: stopped.append(True))
    losses: list[Tensor] = []
    last, saved, shown = time.perf_counter(), time.perf_counter(), training.step
    unet.train()
    while not stopped:
        done = max(training.step / options.steps, training.seconds / 60 / options.minutes)
        if done >= 1:
            break
        rate = options.lr * min(1.0, (training.step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * done))
        for group in training.optimizer.param_groups:
            group["lr"] = rate
        rows = torch.randint(len(pictures), (options.batch,), device=device)
        batch, kinds = pictures[rows].float() / 127.5 - 1, labels[rows]
        kinds = torch.where(torch.rand(len(rows), device=device) < 0.1, null_label, kinds)
        timesteps = torch.randint(len(betas), (len(rows),), device=device)
        x_t, eps = noisy(batch, timesteps, alphas_cumprod)
        with autocast:
            predicted = unet(x_t, timesteps, kinds).sample
        loss = nn.functional.mse_loss(predicted.float(), eps)
        training.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        training.optimizer.step()
        training.step += 1
        training.average_weights()
        losses.append(loss.detach())
        now = time.perf_counter()
        training.seconds, last = training.seconds + now - last, now
        if training.step - shown >= 100:
            mean, shown = torch.stack(losses).mean().item(), training.step
            print(f"step {training.step}, {training.seconds / 60:.1f} min, loss {mean:.4f}, {done:.0%}", flush=True)
            losses.clear()
        if now - saved > 180:
            training.save(state)
            saved = now
    training.save(state)


def write_model(training: Training, model: Path, out: Path) -> None:
    """OUT_FOLDER as a diffusers pipeline folder with the averaged weights in float16."""
    for part in ("model_index.json", "labels.json", "scheduler/scheduler_config.json", "unet/config.json"):
        if (model / part).is_file():
            (out / part).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(model / part, out / part)
    save_file({name: value.half().contiguous().cpu() for name, value in training.average.items()}, out / WEIGHTS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="IDX files, or one folder of pictures per label")
    parser.add_argument("out", type=Path, help="diffusers folder to write; holds the state of an unfinished training")
    parser.add_argument("--model", type=Path, default=EMBEDDED, help="configuration and first weights (the demo model)")
    parser.add_argument("--fresh", action="store_true", help="begin with random weights")
    parser.add_argument("--steps", type=float, default=math.inf, help="end after so many steps")
    parser.add_argument("--minutes", type=float, default=math.inf, help="end after so many minutes of training")
    parser.add_argument("--lr", type=float, default=3e-4, help="learning rate before the cosine decay")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--float32", action="store_true", help="no bfloat16 autocast")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if math.isinf(options.steps) and math.isinf(options.minutes):
        parser.error("say how long: --steps or --minutes")
    torch.set_num_threads(options.threads)
    config = json.loads((options.model / "unet" / "config.json").read_text())
    pictures, labels = read_pictures(options.data, config["sample_size"], config["in_channels"])
    if labels.max() >= config["num_class_embeds"] - 1:
        raise SystemExit(f"the model knows {config['num_class_embeds'] - 1} labels, the data has {labels.max() + 1}")
    torch.manual_seed(options.seed)
    unet = UNet2DModel.from_config(config)
    if not options.fresh:
        unet.load_state_dict(load_file(options.model / WEIGHTS))
    unet = unet.float().to(options.device)
    average = {name: value.detach().clone() for name, value in unet.named_parameters()}
    optimizer = torch.optim.AdamW(unet.parameters(), lr=options.lr, betas=(0.9, 0.99), weight_decay=0.01)
    training = Training(unet, optimizer, average)
    options.out.mkdir(parents=True, exist_ok=True)
    state = options.out / STATE
    if state.is_file():
        training.load(state)
        print(f"going on from step {training.step}", flush=True)
        torch.manual_seed(options.seed + training.step)
    train(training, pictures, labels, options, state)
    write_model(training, options.model, options.out)
    print(f"{training.step} steps in {training.seconds / 60:.1f} minutes; the averaged weights are in {options.out}")


if __name__ == "__main__":
    main()
