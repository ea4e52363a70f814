"""The emoji example: what it packs, that a training goes on to the same weights, that diffusers loads the result."""

import base64
import hashlib
import importlib
import io
import json
import shutil
import sys
import tarfile
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

MODULES = ("data", "evaluate", "pack", "tokenizer", "train", "training")


@pytest.fixture
def emoji(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Imports a module of ``examples/emoji`` as its scripts do: by its bare name."""
    monkeypatch.syspath_prepend(str(repository / "examples" / "emoji"))
    yield importlib.import_module
    for name in MODULES:
        sys.modules.pop(name, None)


# -------------------------------------------------------------------------------------------------------------- packing


def test_one_concept_has_one_key_however_a_set_spells_it(emoji: Any) -> None:
    pack = emoji("pack")
    assert pack.code_key("1F3F3-FE0F-200D-1F308") == pack.code_key("1f3f3-1f308") == "1f3f3-1f308"


def test_concepts_are_found_by_code_then_name_then_alias_then_without_hyphens(emoji: Any) -> None:
    pack = emoji("pack")
    entries = [
        {"hexcode": "1F34E", "label": "red apple", "tags": ["fruit"], "group": 4},
        {"hexcode": "1F557", "label": "eight o\u2019clock", "tags": ["8 o\u2019clock"], "group": 5},
    ]
    concepts = pack.read_concepts(entries)
    assert concepts["1f557"] == {"label": "eight o'clock", "tags": ["8 o'clock"], "group": 5}
    names = pack.Names(concepts, {"one": {"1F34E": "apple-of-one"}, "two": {}})
    assert names.find("one", "apple-of-one", []) == "1f34e"
    assert names.find("two", "red-apple", []) == "1f34e"
    assert names.find("two", "apple-of-one", []) == "1f34e"
    assert names.find("two", "unknown", ["nothing", "red-apple"]) == "1f34e"
    assert names.find("two", "redapple", []) == "1f34e"
    assert names.find("two", "pear", []) is None


def test_icons_become_svg_documents_with_their_own_box(emoji: Any) -> None:
    icons = {
        "width": 32,
        "icons": {"apple": {"body": "<path/>", "left": 1, "height": 24}},
        "aliases": {"fruit": {"parent": "apple"}},
    }
    ((name, aliases, drawing),) = emoji("pack").read_icons(icons)
    assert (name, aliases) == ("apple", ["fruit"])
    assert 'viewBox="1 0 32 24"' in drawing
    assert drawing.endswith("><path/></svg>")


def test_only_concepts_in_three_styles_are_held_out(emoji: Any) -> None:
    concepts = {str(code): {"label": f"thing {code}", "tags": [], "group": 1} for code in range(1000)}
    pictures = [("noto", code) for code in concepts]
    pictures += [(style, code) for style in ("twemoji", "emojione") for code in list(concepts)[:500]]
    captions = emoji("pack").write_captions(concepts, pictures)
    assert [(caption["style"], caption["code"]) for caption in captions] == pictures
    held_out = [caption for caption in captions if caption["split"] == "held-out"]
    assert all(int(caption["code"]) < 500 for caption in held_out)
    assert 45 <= len(held_out) <= 105  # 1500 x 0.05, four deviations


def test_a_picture_lies_in_the_middle_of_a_white_page(emoji: Any, tmp_path: Path) -> None:
    Image.new("RGBA", (256, 128), (0, 0, 255, 255)).save(tmp_path / "wide.png")
    with Image.open(io.BytesIO(emoji("pack").draw(tmp_path / "wide.png"))) as page:
        pixels = np.asarray(page.convert("RGB")).astype(int)
    assert pixels.shape == (128, 128, 3)
    blue = pixels[:, :, 0] < 128
    assert (np.flatnonzero(blue.any(axis=1))[[0, -1]] == [36, 91]).all()
    assert (np.flatnonzero(blue.any(axis=0))[[0, -1]] == [8, 119]).all()
    assert pixels[0].min() >= 250


@pytest.fixture
def package(emoji: Any, tmp_path: Path) -> Callable[[str], Any]:
    """Puts the archive of a package with a given licence into the folder of downloads."""

    def write(licence: str) -> Any:
        content = json.dumps({"name": "pictures", "license": licence}).encode()
        with tarfile.open(tmp_path / "pictures-1.0.0.tgz", "w:gz") as archive:
            entry = tarfile.TarInfo("package/package.json")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        digest = hashlib.sha512((tmp_path / "pictures-1.0.0.tgz").read_bytes()).digest()
        return emoji("pack").Package("pictures", "1.0.0", base64.b64encode(digest).decode(), "somebody")

    return write


def test_a_package_is_unpacked_when_hash_and_licence_are_right(emoji: Any, package: Any, tmp_path: Path) -> None:
    folder = emoji("pack").fetch(package("MIT"), tmp_path)
    assert folder == tmp_path / "pictures-1.0.0"
    assert (folder / "package.json").is_file()


def test_a_package_with_another_licence_is_refused(emoji: Any, package: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"licence CC-BY-SA-4\.0; allowed are Apache-2\.0, CC-BY-4\.0, MIT"):
        emoji("pack").fetch(package("CC-BY-SA-4.0"), tmp_path)


def test_a_changed_archive_is_refused(emoji: Any, package: Any, tmp_path: Path) -> None:
    pinned = package("MIT")
    package("Apache-2.0")
    with pytest.raises(SystemExit, match=r"pinned is .*: delete it and run again"):
        emoji("pack").fetch(pinned, tmp_path)
    assert not (tmp_path / "pictures-1.0.0").exists()


@pytest.mark.slow
def test_the_pinned_packages_pack(emoji: Any, script: Any, tmp_path: Path) -> None:
    pytest.importorskip("resvg_py")
    pytest.importorskip("transformers")
    if shutil.which("npm") is None:
        pytest.skip("fetches packages with npm, which is not installed")
    done = script("emoji/pack.py", tmp_path / "downloads", tmp_path / "data", "--share", "0.01")
    assert done.returncode == 0, done.stderr
    data, pack = emoji("data"), emoji("pack")
    captions = data.read_captions(tmp_path / "data")
    assert set(Counter(caption["style"] for caption in captions)) == set(data.STYLES)
    pictures = data.read_pictures(tmp_path / "data", list(range(len(captions))))
    assert pictures.shape == (len(captions), 3, 128, 128)
    assert (pictures.float().std((1, 2, 3)) > 5).all()  # none is blank
    attribution = (tmp_path / "data" / "ATTRIBUTION.md").read_text(encoding="utf-8")
    for package in (*pack.DRAWINGS.values(), *pack.RENDERINGS.values(), pack.LABELS):
        assert f"`{package.name}` {package.version}" in attribution
    concepts, sources = pack.list_pictures(tmp_path / "downloads")
    split = Counter(caption["split"] for caption in pack.write_captions(concepts, list(sources)))
    assert split == {"train": 8332, "held-out": 431}


# ------------------------------------------------------------------------------------------------------------- captions


def test_captions_leave_out_the_prompt_and_the_style_as_often_as_they_say(emoji: Any) -> None:
    caption = {"style": "noto-v1", "label": "red apple", "tags": ["fruit"]}
    generator = np.random.default_rng(0)
    drawn = [emoji("data").draw_caption(caption, generator) for _ in range(4000)]
    assert drawn.count("") / 4000 == pytest.approx(0.10, abs=0.02)
    named = [text for text in drawn if text]
    assert sum("fruit" in text for text in named) / len(named) == pytest.approx(0.2, abs=0.025)
    assert sum("old noto" not in text for text in named) / len(named) == pytest.approx(1 / 7, abs=0.025)
    assert "old noto emoji of red apple" in named


def test_the_pruned_tokenizer_gives_the_captions_the_same_pieces(emoji: Any, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = emoji("tokenizer")
    merges = [("a", "p"), ("ap", "p"), ("l", "e</w>"), ("app", "le</w>"), ("p", "e"), ("pe", "a"), ("pea", "r</w>")]
    kept = tokenizer.prune_merges(merges, ["Apple"])
    assert kept == merges[:4]
    tokenizer.save_tokenizer(kept, tmp_path)
    loaded = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    assert loaded.tokenize("apple") == tokenizer.build_tokenizer(merges).tokenize("apple") == ["apple</w>"]
    assert loaded.tokenize("pear") == ["p", "e", "a", "r</w>"]
    ids = loaded("apple", padding="max_length").input_ids
    assert len(ids) == tokenizer.MAX_TOKENS
    assert ids[:3] == [516, 515, 517]  # 512 bytes and 4 merges come before the marks
    assert json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8")) == loaded.get_vocab()
    assert len((tmp_path / "merges.txt").read_text(encoding="utf-8").splitlines()) == 1 + len(kept)


# ------------------------------------------------------------------------------------------------------------- training


def options_of(**changed: Any) -> Namespace:
    every = {
        "steps": 6, "minutes": 1, "lr": 0.1, "warmup_steps": 2, "decay_steps": 3,
        "batch": 4, "average": 0.9, "save_minutes": 10, "measure_minutes": 10, "sheet_minutes": 10, "seed": 0,
    }  # fmt: skip
    return Namespace(**{**every, **changed})


def test_every_epoch_shows_every_picture_once(emoji: Any) -> None:
    rows_at = emoji("training").rows_at
    shown = [row for first in range(0, 30, 3) for row in rows_at(first, 3, 10, seed=0)]
    epochs = [shown[first : first + 10] for first in (0, 10, 20)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 3
    assert epochs[0] != epochs[1]


def test_the_rate_rises_holds_and_falls(emoji: Any) -> None:
    options = options_of(steps=100, lr=1.0, warmup_steps=10, decay_steps=20)
    rate_at = emoji("training").rate_at
    rates = [rate_at(step, options) for step in (0, 4, 9, 50, 80, 90, 99)]
    assert rates == pytest.approx([0.1, 0.5, 1.0, 1.0, 1.0, 0.5, 0.05])


def test_a_stopped_training_goes_on_to_the_same_weights(emoji: Any, tmp_path: Path) -> None:
    import torch

    training = emoji("training")

    def train(work: Path, steps: int) -> dict[str, np.ndarray]:
        work.mkdir(exist_ok=True)
        kept = work / "net_state.safetensors"
        torch.manual_seed(0)
        net = torch.nn.Linear(3, 2)
        state = training.Training({"net": net}, rate=0.1, average_decay=0.9)
        if kept.is_file():
            state.load(kept)
        first = state.step

        def next_loss(step: int, samples: int) -> torch.Tensor:
            assert samples == 4 * step
            _, draws = training.generators_at(step, 0)
            return (net(torch.randn(4, 3, generator=draws)) - 1).square().mean()

        # --steps stays 6, so that the decay is the same; the stop is a signal's.
        def stop_or_go(step: int, samples: int) -> torch.Tensor:
            if step == steps - 1:
                import signal

                signal.raise_signal(signal.SIGTERM)
            return next_loss(step, samples)

        training.run(state, stop_or_go, lambda: {"measured": 1.0}, lambda path: None, kept, options_of())
        assert (first, state.step) in {(0, 3), (0, 6), (3, 6)}
        return load_file(kept)

    whole = train(tmp_path / "whole", 6)
    halves = train(tmp_path / "halves", 3)
    assert not np.array_equal(halves["weight.net.weight"], whole["weight.net.weight"])
    halves = train(tmp_path / "halves", 6)
    assert halves.keys() == whole.keys()
    assert len(whole) == 8  # weight, average and two moments of a weight and a bias
    for name, value in whole.items():
        np.testing.assert_array_equal(halves[name], value, err_msg=name)
    assert not list(tmp_path.rglob("*.part"))


@pytest.fixture
def packed(emoji: Any, tmp_path: Path) -> Path:
    """Twelve generated pictures as `pack.py` writes them, one of them held out."""
    data, tokenizer = emoji("data"), emoji("tokenizer")
    folder = tmp_path / "data"
    generator = np.random.default_rng(0)
    captions, files = [], []
    for row in range(12):
        style = list(data.STYLES)[row % 6]
        split = "train" if row else "held-out"
        captions.append({"style": style, "label": f"thing {row // 6}", "tags": [], "split": split})
        content = io.BytesIO()
        pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((128, 128)).save(content, "WEBP")
        files.append(np.frombuffer(content.getvalue(), np.uint8))
    tokenizer.save_tokenizer([("t", "h"), ("e", "m")], folder / "tokenizer")
    ends = np.cumsum([0, *map(len, files)]).astype(np.int64)
    save_file({"bytes": np.concatenate(files), "offsets": ends}, folder / "pictures.safetensors")
    (folder / "captions.json").write_text(json.dumps(captions))
    (folder / "ATTRIBUTION.md").write_text("generated\n")
    return folder


@pytest.mark.slow  # imports transformers' pipelines and runs every stage
def test_all_stages_end_in_a_pipeline_that_diffusers_loads(
    emoji: Any, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    import torch
    from diffusers import StableDiffusionPipeline

    packed = request.getfixturevalue("packed")
    train = emoji("train")
    monkeypatch.setattr(train, "SHEET", ("thing 0",))
    for configuration, small in (
        (train.VAE, {"block_out_channels": (16,) * 4}),
        (train.UNET, {"block_out_channels": (32,) * 3, "attention_head_dim": (1, 1, 1), "cross_attention_dim": 32}),
        (train.TEXT_ENCODER, {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}),
    ):
        for key, value in small.items():
            monkeypatch.setitem(configuration, key, value)

    work = tmp_path / "work"

    def run(*arguments: object) -> None:
        fixed = ("--threads", "1", "--batch", "2", "--warmup-steps", "1")
        monkeypatch.setattr(sys, "argv", ["train.py", str(arguments[0]), str(packed), str(work)])
        sys.argv += [*map(str, arguments[1:]), *fixed]
        train.main()

    run("vae", "--steps", 2)
    latents = train.encode(
        train.read_vae(Namespace(work=work, device="cpu")), train.read_pictures(packed, [*range(1, 12)])
    )
    assert latents.mean((0, 2, 3)).abs().max() < 1e-3
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 1e-3

    run("unet", "--steps", 2)
    once = load_file(work / "unet_state.safetensors")
    (work / "unet_state.safetensors").unlink()
    run("unet", "--steps", 1)
    run("unet", "--steps", 2)
    again = load_file(work / "unet_state.safetensors")
    assert all(np.array_equal(again[name], value) for name, value in once.items())
    lines = [json.loads(line) for line in (work / "unet_log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 1, 2]
    assert {"held_out", "held_out_wrong"} <= lines[0].keys()

    run("export", "--out", tmp_path / "pipeline")
    for name in ("tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/tokenizer.json", "ATTRIBUTION.md"):
        assert (tmp_path / "pipeline" / name).is_file()
    shipped = load_file(tmp_path / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")
    assert shipped.keys() == {name.removeprefix("average.unet.") for name in once if name.startswith("average.unet.")}
    for name, value in shipped.items():
        np.testing.assert_array_equal(value, once[f"average.unet.{name}"].astype(np.float16))
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline", dtype=torch.float32)
    made = pipeline("noto emoji of thing 1", num_inference_steps=2, output_type="np").images
    assert made.shape == (1, 128, 128, 3)
    assert np.isfinite(made).all()


# ----------------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.slow  # imports scikit-learn and diffusers
def test_the_judge_tells_right_pictures_from_wrong_ones_and_sees_copies(emoji: Any) -> None:
    pytest.importorskip("sklearn")
    evaluate = emoji("evaluate")
    generator = np.random.default_rng(0)
    captions = [{"label": f"thing {row % 10}", "style": "noto" if row % 20 < 10 else "twemoji"} for row in range(200)]
    centres = np.eye(12)[[row % 10 for row in range(200)]] + np.eye(12)[[10 + (row % 20 >= 10) for row in range(200)]]

    def make() -> np.ndarray:
        return (20 * centres + generator.normal(size=centres.shape)).astype(np.float32)

    training = make()
    judge = evaluate.Judge(training, captions, resamples=20)
    right = judge(make(), captions)
    assert right["concept_right"] == right["concept_among_5"] == right["style_right"] == 1.0
    assert right["frechet"]["low"] < right["frechet"]["value"] < right["frechet"]["high"] < 20
    wrong = judge(make(), captions[::-1])  # another concept and another style for each
    assert wrong["concept_right"] == wrong["style_right"] == 0.0
    assert judge(training, captions)["nearest_training_picture"][1] < 1e-4 < right["nearest_training_picture"][1]
    assert judge(make() + 5, captions)["frechet"]["low"] > right["frechet"]["high"]
