"""Train the demo model: a class-conditional DDPM on Fashion-MNIST, or on any folder of picture folders.

    python examples/train_ddpm.py FOLDER_WITH_IDX_FILES OUT_FOLDER --minutes 60
    python examples/train_ddpm.py PICTURES OUT_FOLDER --model MODEL_FOLDER --fresh --device cuda --steps 50000

The network's configuration and, unless --fresh, its first weights come from --model, a diffusers pipeline folder;
OUT_FOLDER becomes such a folder itself, with the averaged weights. State is saved as safetensors every few minutes
and when the training is interrupted; the same command goes on from there. On a GPU the network is compiled and a whole
step, from drawing the batch to the averaged weights, is one CUDA graph: such a small network is bound by launches
otherwise. Needs the build extra (torch, diffusers).
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
                clock = torch.tensor(float(self.step), device=value.device if value.is_cuda else "cpu")
                self.optimizer.state[value] = {"step": clock, **moments}


def noisy(pictures: Tensor, timesteps: Tensor, alphas_cumprod: Tensor) -> tuple[Tensor, Tensor]:
    """x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps and eps, both [B, C, H, W] (DDPM, equation 4)."""
    eps = torch.randn_like(pictures)
    abar = alphas_cumprod[timesteps][:, None, None, None]
    return abar.sqrt() * pictures + (1 - abar).sqrt() * eps, eps


class TrainingStep:
    """One step; all that changes from step to step is in tensors, so that a CUDA graph can repeat it."""

    def __init__(self, training: Training, pictures: Tensor, labels: Tensor, options: argparse.Namespace) -> None:
        """``pictures`` [N, C, H, W] uint8 and ``labels`` [N] on the training's device."""
        self.training, self.pictures, self.labels, self.batch = training, pictures, labels, options.batch
        self.device = pictures.device
        schedule = json.loads((options.model / "scheduler" / "scheduler_config.json").read_text())
        betas = torch.linspace(schedule["beta_start"], schedule["beta_end"], schedule["num_train_timesteps"])
        self.alphas_cumprod = (1 - betas.double()).cumprod(0).float().to(self.device)
        self.autocast = torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=not options.float32)
        self.rate, self.share, self.losses = (torch.zeros((), device=self.device) for _ in range(3))
        for group in training.optimizer.param_groups:
            group["lr"] = self.rate
        self.network: nn.Module = training.unet
        self.graph: torch.cuda.CUDAGraph | None = None
        if self.device.type == "cuda":
            self.network = torch.compile(training.unet)

    def __call__(self, rate: float, share: float) -> None:
        """Learning rate ``rate``; ``share`` of the new weights in the average."""
        self.rate.fill_(rate)
        self.share.fill_(share)
        if self.device.type != "cuda":
            self._step()
        elif self.graph is None:
            self._capture()
        else:
            self.graph.replay()

    def _capture(self) -> None:
        """The first steps run on a stream of their own, as a capture demands; then one is recorded."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        self.training.optimizer.zero_grad()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._step()

    def _step(self) -> None:
        training, null_label = self.training, self.training.unet.config.num_class_embeds - 1
        rows = torch.randint(len(self.pictures), (self.batch,), device=self.device)
        batch, kinds = self.pictures[rows].float() / 127.5 - 1, self.labels[rows]
        kinds = torch.where(torch.rand(self.batch, device=self.device) < 0.1, null_label, kinds)
        timesteps = torch.randint(len(self.alphas_cumprod), (self.batch,), device=self.device)
        x_t, eps = noisy(batch, timesteps, self.alphas_cumprod)
        with self.autocast:
            predicted = self.network(x_t, timesteps, kinds).sample
        loss = nn.functional.mse_loss(predicted.float(), eps)
        training.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(training.unet.parameters(), 1.0)
        training.optimizer.step()
        with torch.no_grad():
            self.losses += loss.detach()
            average, weights = list(training.average.values()), list(training.unet.parameters())
            apart = torch._foreach_sub(weights, average)
            torch._foreach_mul_(apart, self.share)
            torch._foreach_add_(average, apart)


def train(training: Training, pictures: Tensor, labels: Tensor, options: argparse.Namespace, state: Path) -> None:
    device = torch.device(options.device)
    training.unet.train()
    step = TrainingStep(training, pictures.to(device), labels.to(device), options)
    stopped = []
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, lambda *_: stopped.append(True))
    last, saved, shown = time.perf_counter(), time.perf_counter(), training.step
    while not stopped:
        done = max(training.step / options.steps, training.seconds / 60 / options.minutes)
        if done >= 1:
            break
        rate = options.lr * min(1.0, (training.step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * done))
        # The first steps count less in the average, so that it forgets where it began.
        step(rate, 1 - min(options.average, (1 + training.step) / (10 + training.step)))
        training.step += 1
        if training.step - shown >= 100:
            mean, shown = step.losses.item() / 100, training.step
            step.losses.zero_()
            print(f"step {training.step}, {training.seconds / 60:.1f} min, loss {mean:.4f}, {done:.0%}", flush=True)
        now = time.perf_counter()
        training.seconds, last = training.seconds + now - last, now
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
    parser.add_argument("--average", type=float, default=0.999, help="decay of the averaged weights")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
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
    unet = unet.float().to(options.device, memory_format=torch.channels_last)
    average = {name: value.detach().clone() for name, value in unet.named_parameters()}
    on_gpu = options.device.startswith("cuda")
    optimizer = torch.optim.AdamW(
        unet.parameters(), lr=torch.tensor(options.lr, device=options.device), betas=(0.9, 0.99), weight_decay=0.01,
        fused=on_gpu, capturable=on_gpu,
    )  # fmt: skip
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
