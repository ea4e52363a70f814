"""From seeds to images on the embedded model: ours beside the diffusers pipeline, in one run, in turn.

Every contender makes the same number of images with DDIM in rounds of one batch, each in its own process, so that a
machine that changes its speed changes it for all. diffusers runs its own loop and scheduler on PyTorch in FP32.
`loop %` is what the timestep loop costs beside the session: noise, tables, copies. The median round forgives a machine
that is taken away for a moment; more images make more rounds.

    python benchmarks/end_to_end.py --save
    python benchmarks/end_to_end.py --images 192 --only "openvino INT8, throughput"
    python benchmarks/end_to_end.py --bundle demo/fashion.qdm

The graphs are made here, or taken from a bundle of the embedded model.
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
from lib.bench import case, checkpoint_of, finish, parser, say, write_float, write_graph
from lib.speed_peers import Opened
from qdm_deploy.components.conditioning import conditioning_of

from qdm_deploy.artifacts.bundle import Bundle
from qdm_deploy.backends import OnnxRuntimeSession, OpenVinoSession
from qdm_deploy.runtime import StepSession, denoise
from qdm_deploy.samplers import NoiseSchedule, step_table
from qdm_export.unet import Checkpoint

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


class Ours:
    """A session and our loop around it."""

    def __init__(self, opened: Opened) -> None:
        """Open the session."""
        checkpoint = checkpoint_of("fashion")
        self.spec, self.schedule = checkpoint.spec, NoiseSchedule.from_config(checkpoint.scheduler_config)
        self.session = Timed(opened())  # type: ignore[arg-type]

    def images(self, seeds: range, steps: int) -> tuple[float, float]:
        """Make them; seconds in all and in the session."""
        table, conditioning = step_table(self.schedule, "ddim", steps), conditioning_of(self.spec, len(seeds))
        self.session.seconds = 0.0
        start = time.perf_counter()
        denoise(self.session, table, seeds, self.spec, conditioning=conditioning, batch_size=len(seeds))  # type: ignore[arg-type]
        return time.perf_counter() - start, self.session.seconds


class Diffusers:
    """What a diffusers user writes for a class-conditional U-Net."""

    def __init__(self) -> None:
        """Load the model."""
        self.checkpoint: Checkpoint = checkpoint_of("fashion")

    def images(self, seeds: range, steps: int) -> tuple[float, None]:
        """Make them; seconds in all."""
        spec, start = self.checkpoint.spec, time.perf_counter()
        scheduler = DDIMScheduler.from_config(dict(self.checkpoint.scheduler_config))
        scheduler.set_timesteps(steps)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        sample = torch.cat([torch.randn(1, *spec.sample_shape, generator=generator) for generator in generators])
        labels = torch.arange(len(seeds)) % (spec.num_classes or 1)
        unet = self.checkpoint.unet.unet
        with torch.inference_mode():
            for timestep in scheduler.timesteps:
                output = unet(sample, timestep, class_labels=labels).sample
                sample = scheduler.step(output, timestep, sample).prev_sample
        return time.perf_counter() - start, None


def _graphs_made(folder: Path) -> tuple[Path, Path, Path]:
    """Float, for ONNX Runtime, and for OpenVINO."""
    model = case("fashion", samples=16)
    plan = model.built()
    return (
        write_float(model, folder),
        write_graph(model, plan, "onnxruntime", folder / "ort"),
        write_graph(model, plan, "openvino", folder / "ov"),
    )


def main() -> None:
    arguments = parser("Images end to end, ours beside diffusers.")
    arguments.add_argument("--images", type=int, default=64)
    arguments.add_argument("--steps", type=int, default=50)
    arguments.add_argument("--batch", type=int, default=16)
    arguments.add_argument(
        "--only", help="beginnings of names, separated by semicolons: time only these, and diffusers"
    )
    arguments.add_argument("--bundle", type=Path, help="take the graphs of this bundle of the embedded model")
    given = arguments.parse_args()
    rounds = [range(first, first + given.batch) for first in range(0, given.images, given.batch)]
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        if given.bundle is None:
            float_graph, on_onnxruntime, on_openvino = _graphs_made(Path(scratch))
        else:
            bundle = Bundle.open(given.bundle)
            float_graph, on_onnxruntime, on_openvino = map(bundle.graph, ("float", "onnxruntime", "openvino"))
        sessions: dict[str, Opened] = {
            "onnxruntime FP32": partial(OnnxRuntimeSession, float_graph),
            "openvino FP32": partial(OpenVinoSession, float_graph, precision="f32"),
            "onnxruntime INT8": partial(OnnxRuntimeSession, on_onnxruntime),
            "onnxruntime INT8, throughput": partial(OnnxRuntimeSession, on_onnxruntime, mode="throughput"),
            "openvino INT8": partial(OpenVinoSession, on_openvino),
            "openvino INT8, throughput": partial(OpenVinoSession, on_openvino, mode="throughput"),
        }
        if given.only is not None:
            parts = tuple(given.only.split(";"))
            sessions = {name: opened for name, opened in sessions.items() if name.startswith(parts)}
        makers = {BASELINE: stack.enter_context(Apart(Diffusers))}
        makers |= {name: stack.enter_context(Apart(partial(Ours, opened))) for name, opened in sessions.items()}
        for maker in makers.values():  # compile, allocate
            maker.ask("images", rounds[0], 2)
        seconds: dict[str, list[float]] = {name: [] for name in makers}
        inside: dict[str, list[float]] = {name: [] for name in sessions}
        for number, seeds in enumerate(rounds):
            say(f"round {number + 1} of {len(rounds)}")
            for name, maker in makers.items():
                whole, session = maker.ask("images", seeds, given.steps)
                seconds[name].append(whole)
                if session is not None:
                    inside[name].append(session)
    rows: list[dict[str, Any]] = [
        {
            "what": name,
            "seconds": sum(values),
            "images/s": len(rounds) * given.batch / sum(values),
            "over diffusers": sum(seconds[BASELINE]) / sum(values),
            "median round": median(values),
            "over, medians": median(seconds[BASELINE]) / median(values),
            "loop %": None if name == BASELINE else 100 * (1 - sum(inside[name]) / sum(values)),
        }
        for name, values in seconds.items()
    ]
    extra = {"images": len(rounds) * given.batch, "steps": given.steps, "sampler": "ddim", "batch": given.batch}
    columns = ["what", "seconds", "images/s", "over diffusers", "median round", "over, medians", "loop %"]
    finish("end-to-end", columns, rows, extra, save=given.save)


if __name__ == "__main__":
    main()
