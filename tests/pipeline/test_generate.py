"""From a bundle to pictures: what is on them follows from seed, label and options alone."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qdm_deploy.components.pictures import read_metadata
from qdm_deploy.errors import BundleError, EnvironmentProblem, InputError
from qdm_deploy.pipeline import BuildResult, GenerateOptions, GenerateResult, generate


def make(bundle: Path, out: Path, **changes: Any) -> GenerateResult:
    quick: dict[str, Any] = {"count": 3, "steps": 3, "backend": "onnxruntime", "precision": "int8", "threads": 1}
    return generate(GenerateOptions(bundle=bundle, out=out, **{**quick, **changes}))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_one_picture_per_seed_with_how_it_was_made(labels_build: BuildResult, tmp_path: Path) -> None:
    result = make(labels_build.bundle, tmp_path / "out", count=5, seed=99998, eta=0.5)
    assert [path.name for path in result.images] == [f"{seed:06d}.png" for seed in range(99998, 100003)]
    assert result.seeds == tuple(range(99998, 100003))
    assert result.backend["backend"] == "onnxruntime"
    assert result.images_per_second == pytest.approx(5 / result.seconds)
    described = [read_metadata(path) for path in result.images]
    # All classes in turn.
    assert [item.label for item in described] == ["shirt", "bag", "boot", "shirt", "bag"]
    assert [item.seed for item in described] == list(result.seeds)
    assert {item.bundle_id for item in described} == {labels_build.bundle_id}
    assert {(item.sampler, item.steps, item.eta, item.backend) for item in described} == {
        ("ddim", 3, 0.5, "onnxruntime int8")
    }
    with Image.open(result.images[0]) as image:
        assert (image.mode, image.size) == ("L", (10, 10))
    assert result.sheet.is_file()


def test_a_label_is_a_name_in_any_case_or_a_number(labels: Path, tmp_path: Path) -> None:
    by_name, by_number = make(labels, tmp_path / "name", prompt="BOOT"), make(labels, tmp_path / "number", prompt="2")
    assert files(tmp_path / "name") == files(tmp_path / "number")
    assert [read_metadata(path).label for path in (*by_name.images, *by_number.images)] == ["boot"] * 6
    make(labels, tmp_path / "bag", prompt="bag")
    assert files(tmp_path / "bag")["00000.png"] != files(tmp_path / "name")["00000.png"]


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_picture_does_not_depend_on_the_batch_it_was_made_in(labels: Path, tmp_path: Path, guidance: float) -> None:
    make(labels, tmp_path / "whole", count=5, batch_size=16, guidance=guidance, sampler="ddpm")
    make(labels, tmp_path / "pairs", count=5, batch_size=2, guidance=guidance, sampler="ddpm")
    make(labels, tmp_path / "single", count=5, batch_size=1, guidance=guidance, sampler="ddpm")
    assert files(tmp_path / "whole") == files(tmp_path / "pairs") == files(tmp_path / "single")


def test_a_picture_depends_on_its_own_seed_only(labels: Path, tmp_path: Path) -> None:
    make(labels, tmp_path / "four", count=4, seed=7, prompt="bag")
    make(labels, tmp_path / "two", count=2, seed=9, prompt="bag")
    four, two = files(tmp_path / "four"), files(tmp_path / "two")
    assert (two["00009.png"], two["00010.png"]) == (four["00009.png"], four["00010.png"])
    assert four["00007.png"] != four["00008.png"]


def pixels(folder: Path) -> Any:
    return np.stack([np.asarray(Image.open(path), np.float64) for path in sorted(folder.glob("0*.png"))])


def test_guidance_moves_away_from_the_null_label(labels: Path, tmp_path: Path) -> None:
    for scale in (0.0, 1.0, 3.0):
        make(labels, tmp_path / str(scale), prompt="boot", guidance=scale, precision="float")
    none, plain, strong = (pixels(tmp_path / str(scale)) for scale in (0.0, 1.0, 3.0))
    assert np.abs(plain - none).max() > 0
    assert np.abs(strong - none).mean() > np.abs(plain - none).mean()


def test_int8_pictures_resemble_the_float_ones(labels: Path, tmp_path: Path) -> None:
    make(labels, tmp_path / "int8")
    make(labels, tmp_path / "float", precision="float")
    difference = np.abs(pixels(tmp_path / "int8") - pixels(tmp_path / "float"))
    assert difference.max() > 0
    assert difference.mean() < 10


def test_the_float_graph_must_be_in_the_bundle(rgb: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"has no graph for 'float'; it has: onnxruntime\. Build it with"):
        make(rgb, tmp_path / "out", precision="float")
    assert list(tmp_path.iterdir()) == []


def test_an_unconditional_model_makes_pictures_without_labels(rgb: Path, tmp_path: Path) -> None:
    result = make(rgb, tmp_path / "out")
    assert [read_metadata(path).label for path in result.images] == [None] * 3
    with Image.open(result.images[0]) as image:
        assert (image.mode, image.size) == ("RGB", (12, 8))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "labels",
            {"prompt": "boots"},
            r"unknown label 'boots' \(did you mean boot\?\); choose one of shirt, bag, boot",
        ),
        ("labels", {"prompt": "3"}, r"unknown label '3'"),
        ("labels", {"backend": "onxruntime"}, r"backend 'onxruntime' is unknown; choose one of auto, onnxruntime"),
        ("labels", {"precision": "int4"}, r"precision 'int4' is unknown; choose auto, int8 or float"),
        ("labels", {"threads": 0}, r"0 threads cannot run anything"),
        ("labels", {"steps": 1001}, r"1001"),
        ("rgb", {"prompt": "7"}, r"rgb is unconditional and was asked for '7'; leave that out"),
        ("rgb", {"guidance": 2.0}, r"the model is unconditional, so there is nothing to guide"),
    ],
)
def test_what_the_bundle_cannot_do_is_refused(
    request: pytest.FixtureRequest, tmp_path: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        make(request.getfixturevalue(name), tmp_path / "out", **changes)
    assert list(tmp_path.iterdir()) == []


def test_a_gpu_backend_needs_its_library_and_a_graph(labels: Path, tmp_path: Path) -> None:
    with pytest.raises(
        (BundleError, EnvironmentProblem), match=r"no graph for 'tensorrt'|needs the Python module 'tensorrt'"
    ):
        make(labels, tmp_path / "out", backend="tensorrt")
    assert list(tmp_path.iterdir()) == []


def test_there_must_be_a_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="nowhere"):
        make(tmp_path / "nowhere", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_force_replaces_pictures_of_ours_only(labels: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(labels, out, seed=1)
    with pytest.raises(InputError, match=r"out exists: choose another name"):
        make(labels, out, seed=5)
    make(labels, out, seed=5, force=True)
    assert set(files(out)) == {"00005.png", "00006.png", "00007.png", "contact_sheet.png"}
    for name, content in (("notes.txt", b"mine"), ("photo.png", b"not a picture of ours")):
        (out / name).write_bytes(content)
        with pytest.raises(InputError, match=f"holds {name}, which"):
            make(labels, out, seed=5, force=True)
        assert (out / name).read_bytes() == content
        (out / name).unlink()


def test_an_interruption_leaves_no_pictures(labels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import qdm_deploy.pipeline.images_from_bundle as module

    save, saved = module.save_png, []

    def interrupted(path: Path, *rest: Any) -> None:
        if saved:
            raise KeyboardInterrupt
        save(path, *rest)
        saved.append(path.is_file())

    monkeypatch.setattr(module, "save_png", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(labels, tmp_path / "out")
    assert saved == [True]
    assert list(tmp_path.iterdir()) == []


def test_the_contact_sheet_stops_at_256_pictures(labels: Path, tmp_path: Path) -> None:
    result = make(labels, tmp_path / "out", count=257, steps=1, batch_size=64)
    assert len(result.images) == 257
    with Image.open(result.sheet) as sheet:
        columns, rows = sheet.width // 96, sheet.height // 96
    assert columns * rows < 17 * 20


def test_text_models_need_their_states(quick_build: Any, tiny: Any, text_states: Path, tmp_path: Path) -> None:
    """A latent text model builds, judges the model's output alone, and makes no pictures."""
    model = tmp_path / "text"
    shutil.copytree(tiny.folder("text"), model)
    (model / "model_index.json").write_text(
        json.dumps({"_class_name": "LatentConsistencyModelPipeline", "vae": ["a", "b"]})
    )
    result = quick_build(
        tmp_path / "text.qdm", "text", model=str(model), conditioning_file=text_states, guidance=2.0,
        targets=("onnxruntime",), verify_samples=4,
    )  # fmt: skip
    (row,) = result.report.quality
    assert row.psnr_db == ()
    assert row.eps_sqnr_min_db > 18
    assert "data:image/png" not in (result.bundle / "report.html").read_text(encoding="utf-8")
    with pytest.raises(InputError, match=r"give a safetensors file with encoder_hidden_states \[N, 77, 16\]"):
        make(result.bundle, tmp_path / "out")
    with pytest.raises(InputError, match=r"the samples of the model 'text' are latents"):
        make(result.bundle, tmp_path / "out", conditioning_file=text_states)
    assert not (tmp_path / "out").exists()
