"""From seeds to images on the embedded model: ours beside the diffusers pipeline, in one run, in turn.

Every contender makes the same number of images with DDIM in rounds of one batch, each in its own process, so that a
machine that changes its speed changes it for all. diffusers runs its own loop and scheduler on PyTorch in FP32.
`loop %` is what the timestep loop costs beside the session: noise, tables, copies. The median round forgives a machine
that is taken away for a moment; more images make more rounds.

    python benchmarks/end_to_end.py --save zen5
    python benchmarks/end_to_end.py --images 192 --only "openvino INT8, throughput"
"""

import tempfile
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import DDIMScheduler
from lib.apart import Apart
from lib.case import case, checkpoint_of, conditioning_of, write_float, write_graph
from lib.results import finish, parser, say
from lib.sessions import Opening

from qdm_deploy.components.sampling import table_for
from qdm_deploy.runtime import denoise
from qdm_deploy.samplers import NoiseSchedule
from qdm_deploy.samplers.sampling import Sampling

BASELINE = "diffusers, torch FP32"


class Ours:
    """A session and our loop around it."""

    def __init__(self, opened: Opening) -> None:
        """Open the session."""
        checkpoint = checkpoint_of("fashion")
        self.spec, self.schedule = checkpoint.spec, NoiseSchedule.from_config(checkpoint.scheduler_config)
        self.session, self.inside = opened(), 0.0
        step = self.session.run

        def timed(inputs: Any) -> Any:
            start = time.perf_counter()
            result = step(inputs)
            self.inside += time.perf_counter() - start
            return result

        self.session.run = timed  # type: ignore[method-assign]

    def images(self, seeds: range, steps: int) -> tuple[float, float]:
        """Make them; seconds in all and in the session."""
        table = table_for(self.spec.denoiser, self.schedule, "ddim", steps)
        sampling = Sampling(table, seeds, conditioning_of(self.spec, len(seeds)))
        self.inside, start = 0.0, time.perf_counter()
        denoise(self.session, sampling, batch_size=len(seeds))
        return time.perf_counter() - start, self.inside


class Diffusers:
    """What a diffusers user writes for a class-conditional U-Net."""

    def __init__(self) -> None:
        """Load the model."""
        self.checkpoint = checkpoint_of("fashion")

    def images(self, seeds: range, steps: int) -> tuple[float, float]:
        """Make them; seconds in all, twice: its loop is not told apart."""
        spec, start = self.checkpoint.spec, time.perf_counter()
        scheduler = DDIMScheduler.from_config(dict(self.checkpoint.scheduler_config))
        scheduler.set_timesteps(steps)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        sample = torch.cat([torch.randn(1, *spec.sample_shape, generator=generator) for generator in generators])
        labels = torch.from_numpy(conditioning_of(spec, len(seeds)).own["class_labels"])
        unet = self.checkpoint.unet.unet
        with torch.inference_mode():
            for timestep in scheduler.timesteps:
                output = unet(sample, timestep, class_labels=labels).sample
                sample = scheduler.step(output, timestep, sample).prev_sample
        return time.perf_counter() - start, time.perf_counter() - start


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--images", type=int, default=64)
    arguments.add_argument("--steps", type=int, default=50)
    arguments.add_argument("--batch", type=int, default=16)
    arguments.add_argument(
        "--only", default="", help="beginnings of names, separated by semicolons: these, and diffusers"
    )
    given = arguments.parse_args()
    rounds = [range(first, first + given.batch) for first in range(0, given.images, given.batch)]
    times: dict[str, list[tuple[float, float]]] = {}
    model = case("fashion", samples=16)
    plan = model.built()
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        float_graph = write_float(model, Path(scratch))
        on_onnxruntime, on_openvino = (
            write_graph(model, plan, target, Path(scratch) / target) for target in ("onnxruntime", "openvino")
        )
        sessions = {
            "onnxruntime FP32": Opening("onnxruntime", float_graph, {}),
            "openvino FP32": Opening("openvino", float_graph, {"precision": "f32"}),
            "onnxruntime INT8": Opening("onnxruntime", on_onnxruntime, {}),
            "onnxruntime INT8, throughput": Opening("onnxruntime", on_onnxruntime, {"mode": "throughput"}),
            "openvino INT8": Opening("openvino", on_openvino, {}),
            "openvino INT8, throughput": Opening("openvino", on_openvino, {"mode": "throughput"}),
        }
        makers = {BASELINE: stack.enter_context(Apart(Diffusers))}
        for name, opening in sessions.items():
            if name.startswith(tuple(given.only.split(";"))):
                makers[name] = stack.enter_context(Apart(partial(Ours, opening)))
        for maker in makers.values():  # compile, allocate
            maker.ask("images", rounds[0], 2)
        for number, seeds in enumerate(rounds):
            say(f"round {number + 1} of {len(rounds)}")
            for name, maker in makers.items():
                times.setdefault(name, []).append(maker.ask("images", seeds, given.steps))
    whole = {name: [seconds for seconds, _ in values] for name, values in times.items()}
    rows: list[dict[str, Any]] = [
        {
            "what": name,
            "images/s": len(rounds) * given.batch / sum(values),
            "over diffusers": sum(whole[BASELINE]) / sum(values),
            "median round s": median(values),
            "over, medians": median(whole[BASELINE]) / median(values),
            "loop %": None if name == BASELINE else 100 * (1 - sum(inside for _, inside in times[name]) / sum(values)),
        }
        for name, values in whole.items()
    ]
    extra = {"images": len(rounds) * given.batch, "steps": given.steps, "sampler": "ddim", "batch": given.batch}
    finish("end-to-end", rows, extra, save=given.save)


if __name__ == "__main__":
    main()
