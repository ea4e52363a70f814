"""From seeds to images on the embedded model: ours beside the diffusers pipeline, in one run, in turn.

Every contender makes the same number of images with DDIM in rounds of one batch, so that a machine that changes its
speed changes it for all. diffusers runs its own loop and scheduler on PyTorch in FP32. `loop %` is what the timestep
loop costs beside the session: noise, tables, copies.

    python benchmarks/end_to_end.py --save
"""

import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench import Case, case, finish, parser, say, write_float, write_graph
from diffusers import DDIMScheduler

from qdm_deploy.runtime import OnnxRuntimeSession, OpenVinoSession, StepSession, denoise
from qdm_deploy.runtime.conditioning import conditioning_of
from qdm_deploy.samplers import step_table

BASELINE = "diffusers, torch FP32"


class Timed:
    """A session that adds up the time inside it."""

    def __init__(self, session: StepSession) -> None:
        """Wrap ``session``."""
        self.session, self.seconds = session, 0.0
        self.max_batch, self.input_names = session.max_batch, session.input_names

    def run(self, inputs: Any) -> Any:
        """One step."""
        start = time.perf_counter()
        result = self.session.run(inputs)
        self.seconds += time.perf_counter() - start
        return result


def diffusers_images(model: Case, steps: int, seeds: range) -> None:
    """What a diffusers user writes for a class-conditional U-Net."""
    spec = model.checkpoint.spec
    scheduler = DDIMScheduler.from_config(dict(model.checkpoint.scheduler_config))
    scheduler.set_timesteps(steps)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    sample = torch.cat([torch.randn(1, *spec.sample_shape, generator=generator) for generator in generators])
    labels = torch.arange(len(seeds)) % (spec.num_classes or 1)
    unet = model.checkpoint.unet.unet
    with torch.inference_mode():
        for timestep in scheduler.timesteps:
            output = unet(sample, timestep, class_labels=labels).sample
            sample = scheduler.step(output, timestep, sample).prev_sample


def main() -> None:
    arguments = parser("Images end to end, ours beside diffusers.")
    arguments.add_argument("--images", type=int, default=64)
    arguments.add_argument("--steps", type=int, default=50)
    arguments.add_argument("--batch", type=int, default=16)
    given = arguments.parse_args()
    model = case("fashion", samples=16)
    spec, table = model.checkpoint.spec, step_table(model.schedule, "ddim", given.steps)
    rounds = [range(first, first + given.batch) for first in range(0, given.images, given.batch)]
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        plan, folder = model.built(), Path(scratch)
        float_graph = write_float(model, folder)
        sessions = {
            "onnxruntime FP32": OnnxRuntimeSession(float_graph),
            "openvino FP32": OpenVinoSession(float_graph, precision="f32"),
            "onnxruntime INT8": OnnxRuntimeSession(write_graph(model, plan, "onnxruntime", folder / "ort")),
            "openvino INT8": OpenVinoSession(write_graph(model, plan, "openvino", folder / "ov")),
            "openvino INT8, throughput": OpenVinoSession(folder / "ov" / "openvino.onnx", mode="throughput"),
        }
        timed = {name: Timed(stack.enter_context(session)) for name, session in sessions.items()}
        conditioning = conditioning_of(spec, given.batch)

        def ours(name: str, table: Any, seeds: range) -> None:
            denoise(timed[name], table, seeds, spec, conditioning=conditioning, batch_size=given.batch)  # type: ignore[arg-type]

        runs: dict[str, Callable[[Any, range], object]] = {
            BASELINE: lambda table, seeds: diffusers_images(model, table.steps, seeds),
            **{name: partial(ours, name) for name in timed},
        }
        short = step_table(model.schedule, "ddim", 2)
        for run in runs.values():  # compile, allocate
            run(short, rounds[0])
        seconds = dict.fromkeys(runs, 0.0)
        for session in timed.values():
            session.seconds = 0.0
        for number, seeds in enumerate(rounds):
            say(f"round {number + 1} of {len(rounds)}")
            for name, run in runs.items():
                start = time.perf_counter()
                run(table, seeds)
                seconds[name] += time.perf_counter() - start
    rows: list[dict[str, Any]] = [
        {
            "what": name,
            "seconds": total,
            "images/s": len(rounds) * given.batch / total,
            "over diffusers": seconds[BASELINE] / total,
            "loop %": None if name == BASELINE else 100 * (1 - timed[name].seconds / total),
        }
        for name, total in seconds.items()
    ]
    extra = {"images": len(rounds) * given.batch, "steps": given.steps, "sampler": "ddim", "batch": given.batch}
    finish("end-to-end", ["what", "seconds", "images/s", "over diffusers", "loop %"], rows, extra, save=given.save)


if __name__ == "__main__":
    main()
