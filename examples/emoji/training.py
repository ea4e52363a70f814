"""A training that can stop after any step and go on to the same weights."""

import argparse
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


@dataclass
class Training:
    """Networks, their averages, the optimizer and the counters: all that a continued training needs."""

    networks: dict[str, nn.Module]
    rate: float
    average_decay: float
    step: int = 0
    samples: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.weights = {
            f"{part}.{name}": value for part, net in self.networks.items() for name, value in net.named_parameters()
        }
        self.average = {name: value.detach().clone() for name, value in self.weights.items()}
        self.optimizer = torch.optim.AdamW(
            self.weights.values(), lr=self.rate, betas=(0.9, 0.98), weight_decay=1e-3, fused=True
        )

    def update(self, loss: Tensor, rate: float, samples: int) -> None:
        """One step of the optimizer and of the averages; the first steps count less in the averages."""
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.weights.values(), 1.0)
        self.optimizer.step()
        share = 1 - min(self.average_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.values()), list(self.weights.values()), share)
        self.step += 1
        self.samples += samples

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The networks hold the averaged weights inside."""
        live = {name: value.detach().clone() for name, value in self.weights.items()}
        self._set(self.average)
        try:
            yield
        finally:
            self._set(live)

    @torch.no_grad()
    def _set(self, values: dict[str, Tensor]) -> None:
        for name, value in self.weights.items():
            value.copy_(values[name])

    def save(self, path: Path) -> None:
        """Write everything to ``path``, whole or not at all."""
        tensors = {f"weight.{name}": value.detach() for name, value in self.weights.items()}
        tensors |= {f"average.{name}": value for name, value in self.average.items()}
        for name, value in self.weights.items():
            tensors |= {f"{key}.{name}": self.optimizer.state[value][key] for key in ("exp_avg", "exp_avg_sq")}
        counters = {key: str(getattr(self, key)) for key in ("step", "samples", "seconds")}
        save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, f"{path}.part", counters)
        os.replace(f"{path}.part", path)

    def load(self, path: Path) -> None:
        """Go on from what `save` wrote."""
        with safe_open(path, "pt") as file:
            counters = file.metadata()
        self.step, self.samples = int(counters["step"]), int(counters["samples"])
        self.seconds = float(counters["seconds"])
        tensors = load_file(path)
        self._set({name: tensors[f"weight.{name}"] for name in self.weights})
        for name, value in self.weights.items():
            self.average[name].copy_(tensors[f"average.{name}"])
            moments = {
                key: torch.empty_like(value).copy_(tensors[f"{key}.{name}"]) for key in ("exp_avg", "exp_avg_sq")
            }
            clock = torch.tensor(float(self.step), device=value.device)
            self.optimizer.state[value] = {"step": clock, **moments}


@lru_cache(maxsize=2)
def _order(count: int, epoch: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def rows_at(samples: int, batch: int, count: int, seed: int) -> list[int]:
    """Which of ``count`` items come after ``samples`` were seen; every epoch has an order of its own."""
    seen = range(samples, samples + batch)
    return [int(_order(count, at // count, seed)[at % count]) for at in seen]


def generators_at(step: int, seed: int) -> tuple[np.random.Generator, torch.Generator]:
    """The randomness of one step, the same whether or not the training stopped before it."""
    numbers = np.random.default_rng([seed, step])
    return numbers, torch.Generator().manual_seed(int(numbers.integers(2**63)))


def rate_at(step: int, options: argparse.Namespace) -> float:
    """Up over the first ``--warmup-steps``, constant, then down to zero over the last ``--decay-steps``."""
    rise = min(1.0, (step + 1) / options.warmup_steps)
    fall = min(1.0, (options.steps - step) / options.decay_steps) if options.decay_steps else 1.0
    return float(options.lr * rise * fall)


@contextmanager
def told_to_stop() -> Iterator[list[int]]:
    """A list that is empty until the process gets SIGINT or SIGTERM."""
    signals: list[int] = []
    kinds = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(kind, lambda number, _: signals.append(number)) for kind in kinds]
    try:
        yield signals
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)


def run(
    training: Training,
    next_loss: Callable[[int, int], Tensor],
    measure: Callable[[], dict[str, float]],
    draw: Callable[[Path], None],
    state: Path,
    options: argparse.Namespace,
) -> None:
    """Train until ``--steps`` or ``--minutes``, or until the process is told to stop.

    ``next_loss`` (step, samples seen) gives the loss of one batch. Every ``--save-minutes`` ``state`` is saved and a
    line joins the log beside it. After ``--measure-minutes`` and ``--sheet-minutes`` of the process's own time, which
    stands still while others have the processor, the line gets `measure`'s figures and `draw` writes a sheet. Both see
    the averaged weights.
    """
    stem = state.name.removesuffix("_state.safetensors")
    begun = last = saved = time.perf_counter()
    measured = drawn = time.process_time()
    losses: list[float] = []

    def keep(*, figures: bool) -> None:
        training.save(state)
        line = {"step": training.step, "samples": training.samples, "hours": round(training.seconds / 3600, 3)}
        line |= {
            "loss": round(float(np.mean(losses)), 5),
            "rate": round(len(losses) * options.batch / (last - saved), 2),
        }
        if figures:
            with training.averaged():
                line |= {name: round(value, 5) for name, value in measure().items()}
        with state.with_name(f"{stem}_log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")
        losses.clear()

    with told_to_stop() as stopped:
        while training.step < options.steps and not stopped and last - begun < options.minutes * 60:
            loss = next_loss(training.step, training.samples)
            training.update(loss, rate_at(training.step, options), options.batch)
            losses.append(loss.item())
            now = time.perf_counter()
            training.seconds, last = training.seconds + now - last, now
            if training.step % 50 == 0:
                left = (options.steps - training.step) * (now - saved) / len(losses)
                left = min(left, options.minutes * 60 - (now - begun))
                shown = f"{timedelta(seconds=round(left))} left" if left < 1e9 else "no end set"
                print(f"step {training.step}, loss {np.mean(losses[-50:]):.4f}, {shown}", flush=True)
            if now - saved > options.save_minutes * 60:
                figures = time.process_time() - measured > options.measure_minutes * 60
                keep(figures=figures)
                measured = time.process_time() if figures else measured
                saved = last = time.perf_counter()
            if time.process_time() - drawn > options.sheet_minutes * 60:
                with training.averaged():
                    draw(state.with_name(f"{stem}_{training.samples // 1000:05d}k.png"))
                drawn, last = time.process_time(), time.perf_counter()
        if losses:
            keep(figures=not stopped)  # whoever stops it waits for the state only
