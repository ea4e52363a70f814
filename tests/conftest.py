"""What every test may use: where the repository is, the rule for GPU tests, hypothesis without a clock, tiny U-Nets."""

import functools
import json
import signal
import subprocess
from collections.abc import Callable, Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

# Reproducible, and indifferent to how busy the machine is.
settings.register_profile("qdm", deadline=None, derandomize=True)
settings.load_profile("qdm")

# A shell that starts the suite in the background ignores SIGINT for it, and every child would inherit that: the tests
# of Ctrl-C would test the shell.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked ``gpu`` where the NVIDIA driver offers no device; the mark's argument says what is missed."""
    mark = item.get_closest_marker("gpu")
    if mark is not None and not Path("/dev/nvidiactl").exists():
        pytest.skip(
            f"needs an NVIDIA GPU; would have shown that {mark.args[0]}" if mark.args else "needs an NVIDIA GPU"
        )


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what is cached per machine out of the home of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QDM_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).parents[1]


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[Path, str], Path]]:
    """Mounts a tmpfs with the options given; needs root."""

    def mount_tmpfs(path: Path, options: str) -> Path:
        path.mkdir(parents=True, exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError as error:
            pytest.skip(f"there is no mount command, so a full or read-only disk is not tried: {error}")
        if done.returncode != 0:
            pytest.skip(f"mounting a tmpfs needs root, so a full or read-only disk is not tried: {done.stderr.strip()}")
        return path

    yield mount_tmpfs
    # From the kernel's list and not from ours: a mount moves along when a folder above it is renamed.
    for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
        target = line.split()[1]
        if target.startswith(f"{tmp_path}/"):
            subprocess.run(["umount", target], check=True)


TINY = ("labels", "rgb", "text", "variance")


def _once(stage: Callable[..., Any]) -> Callable[..., Any]:
    """Keep what a stage makes, by its arguments, for as long as its models live."""

    @functools.wraps(stage)
    def kept(self: Any, *arguments: Any, **options: Any) -> Any:
        key = (stage.__name__, arguments, tuple(sorted(options.items())))
        if key not in self.made:
            self.made[key] = stage(self, *arguments, **options)
        return self.made[key]

    return kept


class TinyModels:
    """Four U-Nets of diffusers with random weights, and what the pipeline makes of them; each stage runs once.

    labels: class labels with a null label, attention, two levels; its skips and steps differ enough for k and r.
    rgb: unconditional, not square, its upper level too narrow for INT8.
    text: cross attention.
    variance: class labels without a null label, learned variance.
    """

    def __init__(self, root: Path) -> None:
        import torch

        # One thread: the same bits on every machine, and no time lost where the other cores are busy.
        torch.set_num_threads(1)
        self.root = root
        self.made: dict[Any, Any] = {}

    @_once
    def folder(self, name: str) -> Path:
        import torch
        from diffusers import DDPMScheduler

        torch.manual_seed(TINY.index(name))
        unet = _unet(name)
        with torch.no_grad():
            # Skips of different range, and an output of the size of the noise it predicts.
            unet.conv_in.weight.mul_(4)
            unet.down_blocks[0].resnets[0].conv2.weight.mul_(8)
            unet.conv_out.weight.mul_(3)
        folder = self.root / name
        unet.save_pretrained(folder / "unet")
        variance = "learned_range" if name == "variance" else "fixed_small"
        DDPMScheduler(timestep_spacing="leading", variance_type=variance).save_pretrained(folder / "scheduler")
        (folder / "model_index.json").write_text('{"_class_name": "DDPMPipeline"}')
        if name == "labels":
            (folder / "labels.json").write_text(json.dumps(["shirt", "bag", "boot"]))
        return folder

    @_once
    def checkpoint(self, name: str) -> Any:
        from qdm_export.unet import load_checkpoint

        return load_checkpoint(self.folder(name))

    @_once
    def float_graph(self, name: str) -> Any:
        """The exported float graph; clone it before you change it."""
        from qdm_export.float_graph import export_float_graph

        return export_float_graph(self.checkpoint(name))

    @_once
    def topology(self, name: str) -> Any:
        from qdm_export.topology import topology_of

        return topology_of(self.float_graph(name))

    @_once
    def table(self, name: str, steps: int = 12) -> Any:
        from qdm_deploy.samplers import NoiseSchedule, step_table

        schedule = NoiseSchedule.from_config(self.checkpoint(name).scheduler_config)
        sampler = "ddim" if name == "rgb" else "ddpm"
        return step_table(schedule, sampler, steps, learned_variance=name == "variance")

    @_once
    def calibration(self, name: str) -> Any:
        from qdm_calibration.collect import collect_calibration_set
        from qdm_calibration.timesteps import SamplingPlan
        from qdm_deploy.samplers.sampling import Sampling

        sampling = Sampling(
            self.table(name), range(4), self.conditioning(name), guidance=1.5 if name == "labels" else 1.0
        )
        checkpoint = self.checkpoint(name)
        return collect_calibration_set(
            checkpoint.unet, checkpoint.denoiser, sampling, SamplingPlan(samples=4, steps=12)
        )

    @_once
    def conditioning(self, name: str) -> Any:
        """Of four images: random states, or all classes in turn."""
        from qdm_deploy.components.encoders import open_encoder
        from qdm_deploy.samplers.conditioning import Conditioning

        if name != "text":
            return open_encoder(self.checkpoint(name).spec).encode([None] * 4)
        states = np.random.default_rng(0).normal(size=(4, 77, 16)).astype(np.float32)
        return Conditioning({"encoder_hidden_states": states})

    @_once
    def statistics(self, name: str) -> Any:
        from qdm_calibration.statistics import collect_statistics

        return collect_statistics(self.checkpoint(name).unet, self.topology(name), self.calibration(name), 1000)

    @_once
    def plan(self, name: str, **options: Any) -> Any:
        """A plan with every factor in use: thresholds low, ranges without a search unless ``options`` say otherwise."""
        from qdm_calibration.plan import PlanOptions, make_plan

        chosen = PlanOptions(**{"ranges": "minmax", "gain_ratio": 1.02, "branch_ratio": 1.1, "step_bins": 3, **options})
        return make_plan(self.checkpoint(name).unet, self.topology(name), self.statistics(name), chosen)


def _unet(name: str) -> Any:
    from diffusers import UNet2DConditionModel, UNet2DModel

    down, up = "DownBlock2D", "UpBlock2D"
    common = {"layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 8}
    if name == "labels":
        return UNet2DModel(
            sample_size=10, in_channels=1, out_channels=1, block_out_channels=(16, 32), num_class_embeds=4,
            down_block_types=(down, "AttnDownBlock2D"), up_block_types=(up, up), **common,
        )  # fmt: skip
    if name == "rgb":
        return UNet2DModel(
            sample_size=(8, 12), in_channels=3, out_channels=3, block_out_channels=(8, 16),
            down_block_types=(down, down), up_block_types=(up, up), add_attention=False, downsample_padding=0, **common,
        )  # fmt: skip
    if name == "text":
        return UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16,), cross_attention_dim=16,
            down_block_types=("CrossAttnDownBlock2D",), mid_block_type="UNetMidBlock2D",
            up_block_types=("CrossAttnUpBlock2D",), **common,
        )  # fmt: skip
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=2, block_out_channels=(16,), num_class_embeds=3,
        down_block_types=(down,), up_block_types=(up,), add_attention=False, **common,
    )  # fmt: skip


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    """The tiny U-Nets and the stages made of them."""
    return TinyModels(tmp_path_factory.mktemp("models"))


SCHEDULER = """{
  "_class_name": "DDPMScheduler", "num_train_timesteps": 100, "beta_start": 0.001, "beta_end": 0.2,
  "beta_schedule": "linear", "prediction_type": "epsilon", "clip_sample": true, "variance_type": "fixed_small"
}
"""


@pytest.fixture(scope="session")
def linear(repository: Path) -> Any:
    """The module of linear step graphs that the tests of the runtime use."""
    spec = spec_from_file_location("linear_step_graphs", repository / "tests" / "runtime" / "conftest.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def write_bundle(linear: Any) -> Callable[..., Path]:
    """Writes a bundle with one linear graph for ONNX Runtime; keywords are those of ``write_tiny``."""

    from qdm_deploy.artifacts.bundle import BundleWriter
    from qdm_deploy.artifacts.manifest import Compatibility

    def write(out: Path, **kind: bool) -> Path:
        with BundleWriter(out) as bundle:
            (bundle.root / "unet").mkdir()
            model = linear.write_tiny(bundle.root / "unet" / "onnxruntime.onnx", **kind).spec
            (bundle.root / "scheduler").mkdir()
            (bundle.root / "scheduler" / "scheduler_config.json").write_text(SCHEDULER)
            bundle.publish(
                name=model.name,
                pipeline=model,
                targets=["onnxruntime"],
                compatibility=Compatibility(opset=21, min_runtime="0.1"),
                provenance={},
                recipe={},
            )
        return out

    return write
