"""INT8 beside its reference, by seeds and beside real pictures; chunks that survive an interruption."""

import html
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest

from qdm_deploy.artifacts.bundle import Bundle
from qdm_deploy.errors import InputError
from qdm_deploy.evaluate import evaluation, sample_cache
from qdm_deploy.evaluate.feature_classifier import SHIPPED
from qdm_deploy.evaluate.sample_cache import SampleCache
from qdm_deploy.pipeline import BuildOptions, CompareOptions, EvaluateOptions, build, compare, evaluate
from qdm_deploy.report.evaluation import DistributionRow, Evaluation, frechet_sentence


def options(bundle: Path, cache: Path, **changes: Any) -> EvaluateOptions:
    quick: dict[str, Any] = {"paired": 3, "num": 8, "steps": 3, "backend": "onnxruntime", "threads": 1}
    return EvaluateOptions(bundle=bundle, cache=cache, **{**quick, **changes})


@pytest.fixture(scope="module")
def clothes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of random weights that makes pictures of the size and classes of the shipped classifier."""
    import torch
    from diffusers import DDPMScheduler, UNet2DModel

    folder = tmp_path_factory.mktemp("clothes")
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=28, in_channels=1, out_channels=1, block_out_channels=(16,), num_class_embeds=10,
        layers_per_block=1, norm_num_groups=4, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        add_attention=False,
    )  # fmt: skip
    unet.save_pretrained(folder / "model" / "unet")
    DDPMScheduler().save_pretrained(folder / "model" / "scheduler")
    (folder / "model" / "model_index.json").write_text('{"_class_name": "DDPMPipeline"}')
    return build(
        BuildOptions(
            out=folder / "clothes.qdm", model=str(folder / "model"), targets=("onnxruntime",), steps=4,
            calibration_samples=2, calibration_steps=4, step_bins=1, ranges="minmax", verify_samples=2, verify_steps=2,
            engines=(), min_speedup=0.0, threads=1,
        )
    ).bundle  # fmt: skip


class Watcher:
    """Notes what was said, and interrupts when a task whose name holds ``stop_at`` opens."""

    def __init__(self, stop_at: str | None = None) -> None:
        self.said: list[str] = []
        self.tasks: list[str] = []
        self.stop_at = stop_at

    @contextmanager
    def task(self, description: str, total: int | None) -> Iterator[Any]:
        self.tasks.append(description)
        if self.stop_at is not None and self.stop_at in description:
            raise KeyboardInterrupt
        yield lambda steps=1: None

    def say(self, message: str) -> None:
        self.said.append(message)


def test_paired_metrics_where_no_classifier_fits(labels: Path, tmp_path: Path) -> None:
    found = evaluate(options(labels, tmp_path / "cache", out=tmp_path / "new" / "result.json", guidance=1.5))
    rows = {row.metric: row for row in found.paired}
    assert list(rows) == [
        "model output SQNR, mean over steps (dB)", "finished sample SQNR (dB)", "image PSNR (dB)",
    ]  # fmt: skip
    for row in rows.values():
        assert 5 < row.worst <= row.mean < 100
        assert 5 < row.low <= row.mean <= row.high < 100
        assert row.seeds == 3
    assert len(found.per_step) == 3
    timesteps = [step.timestep for step in found.per_step]
    assert timesteps == sorted(timesteps, reverse=True)
    for step in found.per_step:
        assert step.output_low <= step.output <= step.output_high
        assert step.sample_low <= step.sample <= step.sample_high
    assert found.per_step[-1].sample == pytest.approx(rows["finished sample SQNR (dB)"].mean)
    assert fmean(step.output for step in found.per_step) == pytest.approx(
        rows["model output SQNR, mean over steps (dB)"].mean
    )
    assert (found.distribution, found.images) == ((), 0)
    assert found.verdict.startswith("Beside A, the image PSNR (dB) of B has a mean of")
    assert "nothing says which is better" in found.verdict
    assert (found.a.precision, found.b.precision, found.a.bundle_id) == ("float", "int8", found.b.bundle_id)
    assert "Only paired metrics: no classifier was given" in found.notes[0]
    assert "No SSIM" in found.notes[1]
    assert Evaluation.model_validate_json((tmp_path / "new" / "result.json").read_bytes()) == found
    assert found.verdict in html.unescape((tmp_path / "new" / "result.html").read_text())


@pytest.mark.slow  # 2000 resamples, and the 10,000 real pictures among themselves
def test_against_real_pictures(clothes: Path, tmp_path: Path) -> None:
    watcher = Watcher()
    found = evaluate(options(clothes, tmp_path, num=20), watcher)
    rows = {row.metric: row for row in found.distribution}
    assert list(rows) == [
        "Frechet distance, features", "Frechet distance, spatial", "kernel distance", "precision", "recall",
        "classifier score", "asked-for label",
    ]  # fmt: skip
    frechet = rows["Frechet distance, features"]
    # Pictures of a network that learned nothing are far away from clothes; other clothes are not.
    assert frechet.floor is not None
    assert min(frechet.a, frechet.b) > 1.5 * frechet.floor
    assert rows["recall"].floor is not None
    assert rows["recall"].floor > rows["recall"].a
    for metric, row in rows.items():
        without = metric in ("Frechet distance, spatial", "recall")
        assert (row.low is None, row.high is None, row.why_no_interval is not None) == (without,) * 3, metric
        if row.low is not None and row.high is not None:
            assert row.low <= row.difference <= row.high, metric
    assert 1 <= rows["classifier score"].a <= 10
    assert rows["asked-for label"].floor == found.classifier_accuracy
    assert found.classifier_accuracy is not None
    assert found.classifier_accuracy > 0.9
    assert found.images == 20
    assert found.verdict is not None
    assert "at N = 20" in found.verdict
    assert [(row.metric, row.seeds) for row in found.paired] == [
        ("model output SQNR, mean over steps (dB)", 3), ("finished sample SQNR (dB)", 3), ("image PSNR (dB)", 20),
        ("image SSIM", 20), ("same label", 20),
    ]  # fmt: skip

    again = Watcher()
    assert evaluate(options(clothes, tmp_path, num=20), again) == found
    # The first three are those of the comparison step by step.
    assert any("images 4 to 20" in task for task in watcher.tasks)
    assert not any("images" in task for task in again.tasks if ":" in task), "both sets of images were in the cache"
    assert "Comparing real pictures with real ones" in watcher.tasks
    assert "Comparing real pictures with real ones" not in again.tasks


def test_an_interrupted_run_goes_on(labels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_cache, "CHUNK_IMAGES", 2)
    # No classifier fits the tiny model, so only the paired seeds would be sampled.
    monkeypatch.setattr(evaluation, "_samples_needed", lambda options, beside_real: 7)
    with pytest.raises(KeyboardInterrupt):
        evaluate(options(labels, tmp_path / "cache"), Watcher("images 7 to 7"))
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*/*")}
    assert sorted(path.name for path in kept) == [
        *(f"samples-{a:06d}-{a + 2:06d}.safetensors" for a in (0, 2, 4)), "steps-000000-000003.safetensors",
    ]  # fmt: skip

    watcher = Watcher()
    found = evaluate(options(labels, tmp_path / "cache"), watcher)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    made = [task for task in watcher.tasks if " to " in task]
    assert made == ["A (onnxruntime float): images 7 to 7 of 7"] + [
        f"B (onnxruntime int8): images {a} of 7" for a in ("4 to 4", "5 to 6", "7 to 7")
    ]
    assert found == evaluate(options(labels, tmp_path / "fresh"))


def test_other_settings_have_other_files(labels: Path, tmp_path: Path) -> None:
    for changes in ({}, {"seed": 1}, {"steps": 2}, {"guidance": 2.0}, {"sampler": "euler"}):
        evaluate(options(labels, tmp_path, **changes))
    # A, B, and what is known of the pair.
    assert len(list(tmp_path.iterdir())) == 15


def test_samples_are_those_of_the_files_and_not_of_the_bundle(labels: Path, tmp_path: Path, reseal: Any) -> None:
    evaluate(options(labels, tmp_path / "cache"))
    other = tmp_path / "other.qdm"
    shutil.copytree(labels, other)
    manifest = other / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_bytes()), "created": "2001-01-01T00:00:00Z"}))
    reseal(other)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    found = evaluate(options(other, tmp_path / "cache"))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")} == before
    assert found.b.bundle_id != Bundle.open(labels).id

    # Another float graph: other samples of A, but B's INT8 graph is the same.
    with (other / "unet" / "float.data").open("r+b") as file:
        file.write(bytes(64))
    reseal(other)
    with_float = {path.name for path in (tmp_path / "cache").iterdir()}
    evaluate(options(other, tmp_path / "cache"))
    assert len({path.name for path in (tmp_path / "cache").iterdir()} - with_float) == 2


def test_what_is_compared_is_what_a_straight_run_gives(labels: Path, tmp_path: Path) -> None:
    found = evaluate(options(labels, tmp_path, paired=3, steps=4, seed=0))
    compared = compare(
        CompareOptions(
            a=labels, b=labels, precision_a="float", samples=3, steps=4, backend_a="onnxruntime",
            backend_b="onnxruntime", threads=1,
        )
    ).quality  # fmt: skip
    assert [step.timestep for step in found.per_step] == list(compared.timesteps)
    assert [step.output for step in found.per_step] == pytest.approx(compared.eps_sqnr_db, abs=0.01)
    assert [step.sample for step in found.per_step] == pytest.approx(compared.state_sqnr_db, abs=0.01)
    assert found.paired[2].mean == pytest.approx(compared.psnr_mean_db, abs=0.01)


def test_a_damaged_file_is_made_again(tmp_path: Path) -> None:
    cache = SampleCache({"of": "the test"}, tmp_path)
    first = {"samples": np.ones((2, 3), np.float32)}
    shapes = {"samples": (3,)}

    def get(make: Any) -> tuple[Any, list[str]]:
        watcher = Watcher()
        return cache.tensors("samples", slice(0, 2), shapes, make, watcher)["samples"], watcher.said

    def unneeded() -> Any:
        raise AssertionError("the file was there")

    get(lambda: first)
    assert np.array_equal(get(unneeded)[0], first["samples"])
    (path,) = cache.folder.iterdir()
    whole = path.read_bytes()
    for content, reason in (
        (whole[:-4], "not usable"),
        (whole.replace(b"samples", b"simples"), "it holds simples"),
        (whole.replace(b"[2,3]", b"[3,2]"), r"samples has shape \[3, 2\]"),
        (whole[:-4] + np.float32(np.nan).tobytes(), "samples is not finite float32 or float64"),
    ):
        path.write_bytes(content)
        values, said = get(lambda: first)
        assert np.array_equal(values, first["samples"])
        assert reason.replace("\\", "") in said[0]
        assert path.read_bytes() == whole


def test_the_cache_lies_where_engines_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QDM_CACHE_DIR", str(tmp_path / "own"))
    assert SampleCache({}).folder.parent == tmp_path / "own" / "evaluations"
    monkeypatch.delenv("QDM_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert SampleCache({}).folder.parent == tmp_path / "xdg" / "qdm-deploy" / "evaluations"


def test_samples_of_other_options_are_not_taken_from_the_cache(labels: Path, tmp_path: Path) -> None:
    together = [evaluate(options(labels, tmp_path / "one", sampler="ddim", eta=eta)) for eta in (0.0, 1.0)]
    alone = evaluate(options(labels, tmp_path / "other", sampler="ddim", eta=1.0))
    assert together[1].paired == alone.paired != together[0].paired


def test_another_bundle_may_be_the_reference(labels: Path, tmp_path: Path, reseal: Any) -> None:
    other = tmp_path / "other.qdm"
    shutil.copytree(labels, other)
    manifest = other / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_bytes()), "name": "other"}))
    reseal(other)
    found = evaluate(options(labels, tmp_path / "cache", against=str(other)))
    assert (found.a.precision, found.a.bundle_id != found.b.bundle_id) == ("int8", True)
    # The same integers under another name.
    assert min(row.worst for row in found.paired) > 150

    config = other / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_bytes()), "beta_end": 0.01}))
    reseal(other)
    with pytest.raises(InputError, match=r"other\.qdm have different schedulers"):
        evaluate(options(labels, tmp_path, against=str(other)))


def test_what_cannot_be_compared_is_refused_before_any_work(labels: Path, rgb: Path, tmp_path: Path) -> None:
    for changes, message in (
        ({"against": str(labels)}, "are the same bundle; give fp32, or another bundle"),
        ({"against": "fp23"}, "there is nothing to compare with at fp23; give fp32"),
        ({"against": str(rgb)}, r"makes \(1, 10, 10\) and .* \(3, 8, 12\), or they are conditioned on other"),
        ({"features": tmp_path / "none"}, r"card\.json cannot be read \(No such file"),
        ({"features": SHIPPED}, r"takes pictures \[1, 28, 28\], and .* makes pixels \[1, 10, 10\]"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate(options(labels, tmp_path / "cache", **changes))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num": 7}, "the number of images is 7; it must be from 8 to 100000"),
        ({"paired": 1}, "the number of paired seeds is 1; it must be from 2 to 4096"),
        ({"steps": 0}, "steps is 0; it must be from 1 to 10000"),
        ({"sampler": "dimm"}, "unknown sampler 'dimm'"),
        ({"batch_size": 0}, "batch size is 0; it must be from 1 to 1024"),
        ({"seed": -1}, "seed is -1; it must be from 0 to"),
        ({"guidance": -1.0}, r"guidance is -1\.0; it must be from 0 to 100"),
        ({"inception_weights": Path("w.safetensors")}, r"only the weights w\.safetensors was given"),
        ({"real_images": Path("r")}, "only the folder r was given"),
        ({"inception_weights": Path("w.pth"), "real_images": Path("r")}, r"w\.pth is no safetensors file"),
        ({"inception_weights": Path("w.safetensors"), "real_images": Path("r")}, r"w\.safetensors does not exist"),
        ({"out": Path("x.html")}, r"x\.html cannot be both the JSON file and the page"),
        ({"html": Path(__file__)}, r"test_evaluate\.py exists; choose another file, or add --force"),
        ({"threads": 0}, "threads is 0; it must be from 1 to 1024"),
        ({"out": Path(__file__)}, r"test_evaluate\.py exists; choose another file, or add --force"),
    ],
)
def test_options(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        options(Path("x"), Path("y"), **changes)


def test_the_sentence_follows_the_interval() -> None:
    row = DistributionRow(metric="Frechet", a=1.0, b=1.5, low=0.25, high=0.75)
    assert frechet_sentence(row, 1000) == (
        "The Frechet difference B - A of +0.5 (95 % interval +0.25 to +0.75) is distinguishable from zero at N = 1000: "
        "A is the closer one to the real images."
    )
    assert "is not distinguishable" in frechet_sentence(row.model_copy(update={"low": -0.1}), 1000)
    with pytest.raises(ValueError, match="Frechet has no interval"):
        frechet_sentence(row.model_copy(update={"low": None}), 1000)
