"""Bundles that an engine can serve: one whose network is linear and starts at once, and a real quantized U-Net."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qdm_deploy.artifacts.bundle import Bundle, BundleWriter
from qdm_deploy.artifacts.manifest import Compatibility
from qdm_deploy.components.sampling import table_for
from qdm_deploy.runtime import StepSession, denoise
from qdm_deploy.samplers import NoiseSchedule
from qdm_deploy.samplers.sampling import Sampling
from qdm_deploy.serving.contract import GenerationRequest
from tests.runtime.conftest import write_tiny

LINEAR_SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": 100,
    "beta_start": 0.001,
    "beta_end": 0.2,
    "clip_sample": True,
    "timestep_spacing": "leading",
}

TARGETS = ("onnxruntime", "openvino")


def _seal(writer: BundleWriter, model: Any, scheduler: dict[str, Any]) -> None:
    (writer.root / "scheduler").mkdir()
    (writer.root / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler))
    compatibility = Compatibility(opset=21, min_runtime="0.1.0")
    writer.publish(
        name=model.name, pipeline=model, targets=TARGETS, compatibility=compatibility, provenance={}, recipe={},
    )  # fmt: skip


@pytest.fixture(scope="session")
def linear(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class-conditional with a null label, [3, 4, 4], 100 timesteps: what tests/runtime knows in closed form."""
    folder = tmp_path_factory.mktemp("linear")
    tiny = write_tiny(folder / "step.onnx", conditional=True)
    with BundleWriter(folder / "linear.qdm") as writer:
        (writer.root / "unet").mkdir()
        for target in (*TARGETS, "float"):
            shutil.copyfile(tiny.graph, writer.root / "unet" / f"{target}.onnx")
        _seal(writer, tiny.spec, LINEAR_SCHEDULER)
    return folder / "linear.qdm"


@pytest.fixture(scope="session")
def unet(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny class-conditional U-Net in INT8, with attention."""
    from qdm_export.shared_weights import save_with_shared_weights
    from qdm_export.targets import emit

    folder = tmp_path_factory.mktemp("unet")
    checkpoint = tiny.checkpoint("labels")
    with BundleWriter(folder / "unet.qdm") as writer:
        root = writer.root / "unet"
        root.mkdir()
        graphs = {
            root / f"{target}.onnx": emit(tiny.float_graph("labels").clone(), tiny.plan("labels"), target).model
            for target in TARGETS
        }
        save_with_shared_weights(graphs.items(), root / "weights.bin")
        _seal(writer, checkpoint.spec, dict(checkpoint.scheduler_config))
    return folder / "unet.qdm"


@pytest.fixture(scope="session")
def alone() -> Callable[..., Any]:
    """The images of a request from ``denoise``, without any engine; ``copies`` fills the batch with the same image."""

    def run(bundle: Path, session: StepSession, request: GenerationRequest, copies: int = 1) -> Any:
        opened = Bundle.open(bundle, check="sizes")
        schedule = NoiseSchedule.from_config(opened.scheduler_config())
        table = table_for(opened.pipeline.denoiser, schedule, request.sampler, request.steps, request.eta)
        sampling = Sampling(table, request.seeds, request.conditioning, request.guidance, request.guidance_rescale)
        images = []
        for index in range(len(sampling)):
            one = sampling.take(slice(index, index + 1))
            same = {name: np.repeat(values, copies, axis=0) for name, values in one.conditioning.own.items()}
            filled = replace(one, seeds=list(one.seeds) * copies, conditioning=replace(one.conditioning, own=same))
            images.append(denoise(session, filled, batch_size=copies)[0])
        return np.stack(images)

    return run
