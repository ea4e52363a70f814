"""Stable Diffusion as a whole: a folder of diffusers goes in, and what prompts become is what diffusers makes."""

import base64
import io
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import diffusers
import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from transformers import CLIPTextModel, CLIPTokenizer

from qdm_deploy.artifacts.bundle import Bundle
from qdm_deploy.components.pictures import read_metadata
from qdm_deploy.errors import InputError
from qdm_deploy.pipeline import BuildOptions, CompareOptions, GenerateOptions, build, compare, generate
from qdm_deploy.samplers import initial_noise
from tests.components.conftest import merges, write_text_encoder, write_tokenizer
from tests.serving.http.conftest import process_of

PROMPTS = ["a red cat", "photo of the blue dog!"]
NEGATIVE = "blue, 7"
SD1 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "set_alpha_to_one": False}


def write_pipeline(folder: Path, scheduler: Any) -> Path:
    torch.manual_seed(11)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32),
        norm_num_groups=4, attention_head_dim=4, cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        latent_channels=4, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, scaling_factor=0.18215,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, sample_size=16,
    )  # fmt: skip
    unet.save_pretrained(folder / "unet")
    vae.save_pretrained(folder / "vae")
    scheduler.save_pretrained(folder / "scheduler")
    write_tokenizer(folder / "tokenizer")
    vocabulary = 512 + len(merges()) + 2
    write_text_encoder(folder / "text_encoder", eos_token_id=vocabulary - 1, vocabulary=vocabulary)
    index = {
        "_class_name": "StableDiffusionPipeline", "safety_checker": [None, None], "feature_extractor": [None, None],
        "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", type(scheduler).__name__], "tokenizer": ["transformers", "CLIPTokenizer"],
        "text_encoder": ["transformers", "CLIPTextModel"],
    }  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def sd1(tmp_path_factory: pytest.TempPathFactory, quick_options: Any) -> tuple[Path, Any]:
    """Folder and finished build, with PNDM as Stable Diffusion 1's files have it."""
    folder = tmp_path_factory.mktemp("sd1")
    scheduler = diffusers.PNDMScheduler(**SD1, skip_prk_steps=True, steps_offset=1)
    model = write_pipeline(folder / "sd1", scheduler)
    options = {**quick_options, "out": folder / "sd1.qdm", "model": str(model), "targets": ("onnxruntime", "openvino")}
    return model, build(BuildOptions(**options))


def by_diffusers(model: Path, scheduler: str | None, seeds: range, **given: Any) -> Any:
    """Pictures [N, H, W, 3] in 0 .. 255 of diffusers' own pipeline, from our first latents."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = json.loads((model / "scheduler" / "scheduler_config.json").read_text())
        pipe = diffusers.StableDiffusionPipeline(
            unet=diffusers.UNet2DConditionModel.from_pretrained(model / "unet"),
            vae=diffusers.AutoencoderKL.from_pretrained(model / "vae"),
            text_encoder=CLIPTextModel.from_pretrained(model / "text_encoder"),
            tokenizer=CLIPTokenizer.from_pretrained(model / "tokenizer"),
            scheduler=getattr(diffusers, scheduler or config["_class_name"]).from_config(config),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
        pipe.set_progress_bar_config(disable=True)
        latents = torch.from_numpy(initial_noise(seeds, (4, 8, 8)))
        return pipe(latents=latents, output_type="np", **given).images.astype(np.float64) * 255


def by_us(bundle: Path, out: Path, **given: Any) -> Any:
    made = generate(GenerateOptions(bundle=bundle, out=out, precision="float", threads=1, **given))
    return np.stack([np.asarray(Image.open(path)) for path in made.images]).astype(np.float64)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(
    ("sampler", "scheduler"),
    [
        (None, None),
        ("ddim", "DDIMScheduler"),
        ("euler", "EulerDiscreteScheduler"),
        ("dpmpp-2m", "DPMSolverMultistepScheduler"),
    ],
)
def test_pictures_of_prompts_equal_those_of_diffusers(
    sd1: tuple[Path, Any], tmp_path: Path, backend: str, sampler: str | None, scheduler: str | None
) -> None:
    model, built = sd1
    (tmp_path / "prompts.txt").write_text("".join(f"{prompt}\t{NEGATIVE}\n" for prompt in PROMPTS))
    wanted = by_diffusers(
        model, scheduler, range(5, 7), prompt=PROMPTS, negative_prompt=[NEGATIVE] * 2, num_inference_steps=6,
        guidance_scale=4.0,
    )  # fmt: skip
    found = by_us(
        built.bundle, tmp_path / "out", count=2, seed=5, steps=6, guidance=4.0, sampler=sampler, backend=backend,
        prompts_file=tmp_path / "prompts.txt",
    )  # fmt: skip
    # Half a step of 8 bits is the most that may lie between them: more than 50 dB.
    assert np.abs(found - wanted).max() < 0.51
    assert wanted.std() > 5


@pytest.mark.slow
def test_v_prediction_and_rescaled_guidance_equal_diffusers(tmp_path: Path, quick_options: Any) -> None:
    scheduler = diffusers.DDIMScheduler(**SD1, prediction_type="v_prediction", clip_sample=False, steps_offset=1)
    model = write_pipeline(tmp_path / "sd2", scheduler)
    options = {**quick_options, "out": tmp_path / "sd2.qdm", "model": str(model), "targets": ("onnxruntime",)}
    built = build(BuildOptions(**options))
    wanted = by_diffusers(
        model, None, range(2), prompt=[PROMPTS[0]] * 2, num_inference_steps=5, guidance_scale=6.0, guidance_rescale=0.7
    )
    found = by_us(
        built.bundle, tmp_path / "out", count=2, steps=5, guidance=6.0, guidance_rescale=0.7, prompt=PROMPTS[0]
    )
    assert np.abs(found - wanted).max() < 0.51


def test_what_the_files_say_is_the_default(sd1: tuple[Path, Any], tmp_path: Path) -> None:
    _, built = sd1
    opened = Bundle.open(built.bundle)
    assert [part.kind for part in opened.pipeline.components] == ["denoiser", "text_encoder", "decoder"]
    assert opened.pipeline.picture_shape == (3, 16, 16)
    assert built.report.recipe["sampler"] == "pndm"
    assert built.report.recipe["guidance"] == 7.5
    made = generate(GenerateOptions(bundle=built.bundle, out=tmp_path / "out", count=1, steps=2, prompt="a red cat"))
    card = read_metadata(made.images[0])
    assert (card.sampler, card.guidance, card.label) == ("pndm", 7.5, "a red cat")
    row = built.report.quality[0]
    assert len(row.psnr_db) == 2  # of decoded pictures
    assert "data:image/png" in (built.bundle / "report.html").read_text(encoding="utf-8")
    found = compare(CompareOptions(a=built.bundle, b=built.bundle, precision_a="float", samples=2, steps=2))
    assert len(found.quality.psnr_db) == 2


def test_without_a_prompt_ours_are_taken_in_turn_and_latents_can_be_had(sd1: tuple[Path, Any], tmp_path: Path) -> None:
    _, built = sd1
    made = generate(
        GenerateOptions(bundle=built.bundle, out=tmp_path / "out", count=2, steps=2, output="latents", threads=1)
    )
    assert made.images == ()
    assert load_file(made.sheet)["latents"].shape == (2, 4, 8, 8)
    pictures = generate(GenerateOptions(bundle=built.bundle, out=tmp_path / "pictures", count=2, steps=2, threads=1))
    assert [read_metadata(path).label for path in pictures.images] == ["a yellow plum", "four ducks"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts_file": Path("absent")}, "there is no file of prompts absent"),
        ({"prompts_file": Path("absent"), "prompt": "x"}, "a prompt and a file of prompts were given"),
        ({"clip_skip": 4}, "clip_skip 4 is not supported; choose 0 or 1"),
        ({"output": "tensors"}, "output 'tensors' is unknown|unknown output 'tensors'"),
        ({"prompt": "(x:2000)", "weighting": True}, "is no weight of a prompt"),
    ],
)
def test_what_cannot_be_made_of_a_prompt_is_refused(
    sd1: tuple[Path, Any], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        generate(GenerateOptions(**{"bundle": sd1[1].bundle, "out": tmp_path / "out", "count": 1, **changes}))
    assert not (tmp_path / "out").exists()


def test_a_server_takes_prompts(sd1: tuple[Path, Any], tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "qdm_deploy.cli.main",
        "serve",
        str(sd1[1].bundle),
        "--port",
        "0",
        "--threads",
        "1",
    ]
    body = {"prompt": PROMPTS[0], "negative_prompt": NEGATIVE, "n": 2, "seed": 5, "num_inference_steps": 4}
    with process_of([*command, "-q", "--backend", "onnxruntime"], tmp_path / "log") as server:
        server.wait_until_ready()
        with httpx.Client(base_url=server.url, timeout=60) as client:
            document = client.post("/v1/images/generations", json=body).json()
            refused = client.post("/v1/images/generations", json={**body, "class_label": 1})
    assert document["size"] == "16x16"
    found = [np.asarray(Image.open(io.BytesIO(base64.b64decode(each["b64_json"])))) for each in document["data"]]
    made = generate(
        GenerateOptions(
            bundle=sd1[1].bundle, out=tmp_path / "out", count=2, seed=5, steps=4, prompt=PROMPTS[0],
            negative_prompt=NEGATIVE, backend="onnxruntime", precision="int8", threads=1,
        )
    )  # fmt: skip
    for picture, path in zip(found, made.images, strict=True):
        # The same samples but for INT8 kernels that round otherwise in a batch of another size.
        assert np.abs(picture.astype(int) - np.asarray(Image.open(path)).astype(int)).mean() < 3
    assert refused.status_code == 400
    assert "takes prompts and has no classes" in refused.json()["error"]["message"]


def test_pictures_need_neither_torch_nor_transformers(sd1: tuple[Path, Any], tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'diffusers', 'onnx', 'onnx_ir'): sys.modules[name] = None\n"
        "from pathlib import Path\n"
        "from qdm_deploy.pipeline import GenerateOptions, generate\n"
        f"made = generate(GenerateOptions(bundle=Path({str(sd1[1].bundle)!r}), out=Path({str(tmp_path / 'out')!r}),\n"
        "    count=1, steps=2, prompt='a red cat', backend='onnxruntime', precision='int8', threads=1))\n"
        "print(len(made.images))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "1", done.stderr
