"""Two steps of training on generated pictures: a folder that diffusers loads, and that a second run goes on from."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file

pytestmark = pytest.mark.slow  # each process imports torch and diffusers first

WEIGHTS = Path("unet") / "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def configuration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder without weights: 8x8 grey pictures, 2 labels and one for none."""
    from diffusers import DDPMScheduler, UNet2DModel

    folder = tmp_path_factory.mktemp("configuration")
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), num_class_embeds=3, layers_per_block=1,
        norm_num_groups=4, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), add_attention=False,
    )  # fmt: skip
    unet.save_config(folder / "unet")
    DDPMScheduler().save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline"}))
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two labels with three pictures each."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for label in ("one", "two"):
        (folder / label).mkdir()
        for index in range(3):
            Image.fromarray(generator.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / label / f"{index}.png")
    return folder


def test_training_writes_a_model_and_goes_on(script: Any, configuration: Path, pictures: Path, tmp_path: Path) -> None:
    from diffusers import UNet2DModel

    def train(steps: int) -> tuple[str, dict[str, np.ndarray]]:
        done = script(
            "train_ddpm.py", pictures, tmp_path / "out", "--model", configuration, "--fresh", "--steps", steps,
            "--batch", 2, "--threads", 1, "--float32",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout, load_file(tmp_path / "out" / WEIGHTS)

    said, first = train(2)
    assert said.startswith("2 steps in ")
    unet = UNet2DModel.from_pretrained(tmp_path / "out" / "unet")
    assert {name: tuple(value.shape) for name, value in unet.named_parameters()} == {
        name: value.shape for name, value in first.items()
    }
    assert {value.dtype for value in first.values()} == {np.dtype(np.float16)}
    for part in ("model_index.json", "scheduler/scheduler_config.json"):
        assert (tmp_path / "out" / part).read_bytes() == (configuration / part).read_bytes()

    said, second = train(3)
    assert said.splitlines()[0] == "going on from step 2"
    assert said.splitlines()[1].startswith("3 steps in ")
    assert any(not np.array_equal(first[name], second[name]) for name in first)
    with safe_open(tmp_path / "out" / "training_state.safetensors", "np") as state:
        assert state.metadata()["step"] == "3"


def test_more_labels_than_the_model_knows_are_refused(
    script: Any, configuration: Path, pictures: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    for label in ("one", "three", "two"):
        (data / label).mkdir(parents=True)
        (data / label / "0.png").write_bytes((pictures / "one" / "0.png").read_bytes())
    done = script("train_ddpm.py", data, tmp_path / "out", "--model", configuration, "--fresh", "--steps", 1)
    assert done.returncode == 1
    assert done.stderr.strip() == "the model knows 2 labels, the data has 3"
    assert not (tmp_path / "out").exists()
