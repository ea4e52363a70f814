from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from PIL import Image

from qdm_deploy.artifacts.pipeline_spec import Denoiser, PipelineSpec
from qdm_deploy.artifacts.step_interface import StepInterface
from qdm_deploy.components.pictures import (
    ImageMetadata,
    comparison_strip,
    contact_sheet,
    read_metadata,
    save_png,
    to_pictures,
)
from qdm_deploy.errors import InputError

METADATA = ImageMetadata(
    version="0.1.0",
    bundle_id="ab" * 32,
    seed=2**63 - 1,
    sampler="ddim",
    steps=20,
    eta=0.5,
    guidance=2.5,
    label="Ankle boot / Stiefelette – ブーツ",
    backend="openvino",
)


def spec(channels: int = 1, kind: Literal["pixels", "latents"] = "pixels") -> PipelineSpec:
    denoiser = Denoiser(interface=StepInterface.of((channels, 2, 2), coefficients=13), num_train_timesteps=10)
    return PipelineSpec(name="tiny", components=(denoiser,), makes=kind)


def test_values_become_pixels() -> None:
    # (x + 1) * 127.5 is 0, 63.75, 127.5 (to even: 128), 255; beyond the range it is cut.
    samples = np.array([[[[-1.0, -0.5], [0.0, 1.0]]], [[[-1.2, 7.0], [1 / 127.5 - 1, 0.999]]]], np.float32)
    pictures = to_pictures(samples, spec())
    assert pictures.dtype == np.uint8
    assert pictures.tolist() == [[[0, 64], [128, 255]], [[0, 255], [1, 255]]]


def test_three_channels_become_rgb() -> None:
    samples = np.full((1, 3, 2, 2), -1.0, np.float32)
    samples[0, 0] = 1.0
    samples[0, 2, 0, 1] = 0.0
    pictures = to_pictures(samples, spec(3))
    assert pictures.shape == (1, 2, 2, 3)
    assert pictures[0, 0, 1].tolist() == [255, 0, 128]
    assert pictures[0, 1, 1].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    ("samples", "model", "message"),
    [
        (np.zeros((1, 4, 2, 2)), spec(4, "latents"), "samples of the model 'tiny' are latents.*no decoder"),
        (np.zeros((1, 2, 2, 2)), spec(2), r"shape \[1, 2, 2, 2\] cannot become pictures; .* 1 or 3 channels"),
        (np.zeros((2, 2)), spec(), r"shape \[2, 2\] cannot become pictures"),
        (np.zeros((1, 1, 2, 3)), spec(), r"the model 'tiny' makes \[N, 1, 2, 2\]"),
        (np.array([[[[0, np.nan], [np.inf, 0]]]]), spec(), "2 of 4 values are NaN or infinite"),
    ],
)
def test_what_is_no_picture_is_refused(samples: Any, model: PipelineSpec, message: str) -> None:
    with pytest.raises(InputError, match=message):
        to_pictures(samples.astype(np.float32), model)


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 3)])
def test_a_png_keeps_pixels_and_metadata(tmp_path: Path, shape: tuple[int, ...]) -> None:
    picture = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    save_png(tmp_path / "a.png", picture, METADATA)
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == ("L" if len(shape) == 2 else "RGB")
        np.testing.assert_array_equal(np.asarray(image), picture)
        assert image.info["qdm-deploy:seed"] == "9223372036854775807"
    assert read_metadata(tmp_path / "a.png") == METADATA
    save_png(tmp_path / "b.png", picture, METADATA)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_metadata_without_a_label(tmp_path: Path) -> None:
    plain = METADATA.model_copy(update={"label": None, "guidance": 1.0, "eta": 0.0})
    save_png(tmp_path / "a.png", np.zeros((2, 2), np.uint8), plain)
    assert read_metadata(tmp_path / "a.png") == plain


def test_files_without_metadata_are_refused(tmp_path: Path) -> None:
    save_png(tmp_path / "plain.png", np.zeros((2, 2), np.uint8))
    with pytest.raises(InputError, match=r"plain\.png does not hold the metadata .*seed: Field required"):
        read_metadata(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(InputError, match=r"text\.png is not a readable PNG file"):
        read_metadata(tmp_path / "text.png")
    with pytest.raises(InputError, match=r"absent\.png is not a readable PNG file: .*No such file"):
        read_metadata(tmp_path / "absent.png")
    Image.new("L", (2, 2)).save(tmp_path / "jpeg.png", format="JPEG")
    with pytest.raises(InputError, match=r"jpeg\.png is not a readable PNG file"):
        read_metadata(tmp_path / "jpeg.png")


def test_contact_sheet_lays_out_a_grid() -> None:
    pictures = np.arange(1, 6, dtype=np.uint8)[:, None, None].repeat(2, 1).repeat(3, 2)
    sheet = contact_sheet(pictures, columns=2, scale=2)
    # Three rows of height 2*2 and two columns of width 3*2, with gaps of 2 around all.
    assert sheet.shape == (3 * (4 + 2) + 2, 2 * (6 + 2) + 2)
    assert sheet[2:6, 2:8].tolist() == np.full((4, 6), 1).tolist()
    assert sheet[2:6, 10:16].tolist() == np.full((4, 6), 2).tolist()
    assert sheet[14:18, 2:8].tolist() == np.full((4, 6), 5).tolist()
    assert (sheet[14:18, 10:16] == 255).all()
    assert (sheet[:2] == 255).all()
    assert (sheet[:, 8:10] == 255).all()


def test_small_pictures_are_enlarged_and_grids_are_square() -> None:
    sheet = contact_sheet(np.zeros((9, 28, 28), np.uint8))
    assert sheet.shape == (3 * (112 + 2) + 2, 3 * (112 + 2) + 2)
    assert contact_sheet(np.zeros((1, 128, 200, 3), np.uint8)).shape == (132, 204, 3)


@pytest.mark.parametrize("shape", [(2, 28, 28), (2, 28, 28, 3)])
def test_captions_are_written_below_and_stay_in_their_place(shape: tuple[int, ...]) -> None:
    pictures = np.full(shape, 255, np.uint8)
    sheet = contact_sheet(pictures, columns=2, captions=["a caption that is far too long for it " * 5, ""])
    assert sheet.shape[:2] == (112 + 14 + 4, 2 * 114 + 2)
    below = sheet[2 + 112 :]
    assert (sheet[: 2 + 112] == 255).all()
    assert below[:, 2 : 2 + 112].min() < 64
    assert (below[:, 2 + 112 :] == 255).all()


def test_comparison_shows_both_and_the_amplified_difference() -> None:
    a = np.full((2, 96, 96), 100, np.uint8)
    b = a.copy()
    b[1, 10, 20] = 97
    b[1, 11, 20] = 255
    strip = comparison_strip(a, b, names=("FP32", "INT8"), amplification=10)
    assert strip.shape == (3 * (96 + 14 + 2) + 2, 2 * 98 + 2)
    third = strip[2 + 2 * 112 :][:96]
    assert (third[:, 2:98] == 0).all()
    assert third[10, 100 + 20] == 30
    assert third[11, 100 + 20] == 255
    assert np.count_nonzero(third[:, 100:196]) == 2
    assert strip[2 + 112 + 10, 100 + 20] == 97


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: contact_sheet(x[:0]), "no pictures"),
        (lambda x: contact_sheet(x, columns=0), "cannot have 0 columns"),
        (lambda x: contact_sheet(x, captions=["one"]), "1 captions were given for 3 pictures"),
        (lambda x: contact_sheet(x, scale=0), "cannot be enlarged by 0"),
        (lambda x: comparison_strip(x, x[:2]), r"shape \[3, 4, 4\] and \[2, 4, 4\] cannot be compared"),
        (lambda x: comparison_strip(x, x, amplification=0), "an amplification of 0"),
        (lambda x: comparison_strip(x[:0], x[:0]), "no pictures"),
    ],
)
def test_wrong_layouts_are_refused(call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(np.zeros((3, 4, 4), np.uint8))
