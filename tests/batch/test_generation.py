"""What a job makes, and that nothing but the job decides it."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qdm_deploy.batch import batch_status, verify_batch
from qdm_deploy.batch.formats import read_indices
from qdm_deploy.components.pictures import read_metadata
from qdm_deploy.errors import BundleError, CheckFailed, InputError
from qdm_deploy.pipeline import GenerateOptions, generate

Make = Callable[..., Any]
Shards = Callable[[Path], dict[str, bytes]]


def test_a_tar_holds_pictures_labels_and_seeds(make: Make, tmp_path: Path) -> None:
    result = make(tmp_path / "out", seed=100)
    assert (result.shards, result.images, result.there) == (4, 23, 0)
    assert result.images_per_second == pytest.approx(23 / result.seconds)
    assert sorted(path.name for path in (tmp_path / "out").glob("shard*")) == [
        f"shard-0000{number}.{suffix}" for number in range(4) for suffix in ("json", "tar")
    ]
    assert verify_batch(tmp_path / "out").ok
    with tarfile.open(tmp_path / "out" / "shard-00003.tar") as archive:
        entries = {entry.name: entry for entry in archive.getmembers()}
        content = {name: archive.extractfile(entry).read() for name, entry in entries.items()}  # type: ignore[union-attr]
    # 18 .. 22: the last shard is short. The parts of one sample stand together, as webdataset wants them.
    assert list(entries) == [f"{index:09d}{suffix}" for index in range(18, 23) for suffix in (".cls", ".json", ".png")]
    assert {(entry.mtime, entry.uid, entry.gid, entry.uname, entry.mode) for entry in entries.values()} == {
        (0, 0, 0, "", 0o644)
    }
    assert json.loads(content["000000019.json"]) == {"index": 19, "seed": 119, "label": 4, "class": "4"}
    assert content["000000019.cls"] == b"4"
    with Image.open(io.BytesIO(content["000000019.png"])) as image:
        assert (image.mode, image.size) == ("RGB", (4, 4))


def test_pictures_are_those_of_generate(make: Make, classes: Path, tmp_path: Path) -> None:
    options = {"steps": 3, "sampler": "ddpm", "guidance": 1.5, "seed": 7, "backend": "onnxruntime", "threads": 1}
    made = generate(GenerateOptions(bundle=classes, out=tmp_path / "one", count=9, batch_size=4, **options))
    make(tmp_path / "many", count=9, format="png", **options)
    for index, path in enumerate(made.images):
        there = tmp_path / "many" / f"shard-{index // 6:05d}" / f"{index:09d}.png"
        assert there.read_bytes() == path.read_bytes()
        assert read_metadata(there).seed == 7 + index


def test_an_npz_is_a_sample_batch_of_guided_diffusion(make: Make, plain: Path, tmp_path: Path) -> None:
    make(tmp_path / "npz", format="npz")
    make(tmp_path / "png", format="png")
    with np.load(tmp_path / "npz" / "shard-00003.npz", allow_pickle=False) as arrays:
        assert arrays.files == ["arr_0", "arr_1", "index"]
        assert (arrays["arr_0"].dtype, arrays["arr_0"].shape) == (np.uint8, (5, 4, 4, 3))
        assert arrays["arr_1"].tolist() == [3, 4, 0, 1, 2]
        assert arrays["index"].tolist() == [18, 19, 20, 21, 22]
        pixels = np.stack([np.asarray(Image.open(path)) for path in sorted((tmp_path / "png/shard-00003").iterdir())])
        np.testing.assert_array_equal(arrays["arr_0"], pixels)
    make(tmp_path / "unconditional", format="npz", bundle=plain)
    with np.load(tmp_path / "unconditional" / "shard-00000.npz", allow_pickle=False) as arrays:
        assert arrays.files == ["arr_0", "index"]


def test_grey_pictures_are_repeated_in_an_npz(tmp_path: Path) -> None:
    from qdm_deploy.batch.formats import write_shard
    from qdm_deploy.batch.pictures import Picture

    pixels = np.arange(20, dtype=np.uint8).reshape(4, 5)
    pictures = [Picture(index, pixels + index, None, None) for index in range(3)]  # type: ignore[arg-type]
    write_shard("npz", tmp_path / "grey.npz", iter([pictures[:2], pictures[2:]]), 3, (1, 4, 5))
    with np.load(tmp_path / "grey.npz", allow_pickle=False) as arrays:
        assert arrays["arr_0"].shape == (3, 4, 5, 3)
        assert all((arrays["arr_0"][2, :, :, channel] == pixels + 2).all() for channel in range(3))


@pytest.mark.parametrize("form", ["webdataset", "npz", "png"])
def test_neither_ranks_nor_their_number_change_a_byte(make: Make, shards: Shards, tmp_path: Path, form: str) -> None:
    make(tmp_path / "whole", format=form)
    # The world changes while the job is under way; nothing is made twice.
    first = make(tmp_path / "parts", format=form, rank=1, world=3)
    assert (first.shards, first.there, first.status.missing) == (1, 0, (0, 2, 3))
    second = make(tmp_path / "parts", format=form, rank=1, world=2)
    assert (second.shards, second.there) == (1, 1)
    rest = make(tmp_path / "parts", format=form)
    assert (rest.shards, rest.there, rest.status.missing) == (2, 2, ())
    assert make(tmp_path / "parts", format=form).images_per_second is None
    assert shards(tmp_path / "parts") == shards(tmp_path / "whole")
    assert verify_batch(tmp_path / "parts").ok


def test_every_batch_has_the_same_number_of_rows(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels may round a row differently in a smaller batch, so the last batch of a shard is filled up."""
    from qdm_deploy.backends.onnxruntime.session import OnnxRuntimeSession

    rows = []
    run = OnnxRuntimeSession.run

    def counted(self: Any, inputs: Any) -> Any:
        rows.append(len(inputs["sample"]))
        return run(self, inputs)

    monkeypatch.setattr(OnnxRuntimeSession, "run", counted)
    make(tmp_path / "out", steps=1)
    assert rows == [4] * 8
    make(tmp_path / "guided", steps=1, guidance=2.0)
    assert rows[8:] == [8] * 8


def test_a_picture_knows_its_index_and_not_its_shard(make: Make, tmp_path: Path) -> None:
    make(tmp_path / "sixes", format="png")
    make(tmp_path / "eights", format="png", shard_size=8)
    flat = [{path.name: path.read_bytes() for path in (tmp_path / out).rglob("0*.png")} for out in ("sixes", "eights")]
    assert len(flat[0]) == 23
    assert flat[0] == flat[1]


def test_one_label_or_all_in_turn(make: Make, tmp_path: Path) -> None:
    make(tmp_path / "all", format="npz", shard_size=23)
    make(tmp_path / "one", format="npz", shard_size=23, label="3")
    labels = []
    for out in ("all", "one"):
        with np.load(tmp_path / out / "shard-00000.npz", allow_pickle=False) as arrays:
            labels.append(arrays["arr_1"].tolist())
    assert labels == [[index % 5 for index in range(23)], [3] * 23]


def test_a_folder_of_another_job_is_refused_with_what_changed(make: Make, shards: Shards, tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(out, rank=0, world=2)
    before = shards(out)
    with pytest.raises(InputError, match=r"out belongs to another job \(seed: 0 there, 5 here; steps: 2 there, 3 here"):
        make(out, steps=3, seed=5)
    with pytest.raises(InputError, match=r"count: 23 there, 24 here"):
        make(out, count=24)
    with pytest.raises(InputError, match=r"batch_size: 4 there, 8 here"):
        make(out, batch_size=8)
    with pytest.raises(InputError, match=r"label: None there, 2 here"):
        make(out, label="2")
    assert shards(out) == before
    assert make(out).there == 2


def test_another_bundle_is_another_job(make: Make, plain: Path, tmp_path: Path) -> None:
    make(tmp_path / "out")
    with pytest.raises(InputError, match=r"bundle_id: [0-9a-f]{64} there, [0-9a-f]{64} here; .*engine\.graph_sha256"):
        make(tmp_path / "out", bundle=plain)


def test_a_folder_with_other_files_is_refused(make: Make, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"out holds notes\.txt and no job\.json; choose a new or an empty folder"):
        make(tmp_path / "out")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match=r"file cannot be made"):
        make(tmp_path / "file")
    (tmp_path / "out" / "job.json").write_text("{}")
    with pytest.raises(InputError, match=r"job\.json cannot be read"):
        make(tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 0}, r"the number of images is 0; it must be from 1 to"),
        ({"shard_size": 0}, r"shard size is 0; it must be from 1 to"),
        ({"workers": 0}, r"workers is 0; it must be from 1 to 256"),
        ({"format": "tar"}, r"unknown format 'tar'; choose one of webdataset, npz, png"),
        ({"format": "webdatset"}, r"unknown format 'webdatset' \(did you mean webdataset\?\)"),
        ({"sampler": "dmp"}, r"unknown sampler 'dmp'"),
        ({"rank": 1}, r"rank is 1 and world is None; give both, or neither"),
        ({"rank": 2, "world": 2}, r"rank is 2; it must be from 0 to 1"),
        ({"seed": 2**63 - 2}, r"seed is \d+; it must be from 0 to"),
        ({"threads": 0}, r"0 threads cannot run anything"),
        ({"grace": -1.0}, r"grace is -1\.0; it must be from 0"),
        ({"label": "5"}, r"unknown label '5'; tiny has the classes 0 to 4"),
        ({"steps": 101}, r"steps=101 is out of range"),
        ({"backend": "onxruntime"}, r"backend 'onxruntime' is unknown"),
        ({"conditioning_file": Path("absent")}, r"takes no states; leave the conditioning file absent out"),
    ],
)
def test_what_cannot_be_made_is_refused_before_anything_is_written(
    make: Make, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        make(tmp_path / "out", **changes)
    assert list(tmp_path.iterdir()) == []


def test_guidance_that_the_model_cannot_have_leaves_no_job(make: Make, plain: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the model is unconditional, so there is nothing to guide"):
        make(tmp_path / "out", bundle=plain, guidance=3.0)
    assert list(tmp_path.rglob("*.json")) == []
    assert make(tmp_path / "out", bundle=plain).status.missing == ()


def test_what_is_missing_here_is_said(make: Make, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="nowhere"):
        make(tmp_path / "out", bundle=tmp_path / "nowhere")
    with pytest.raises(BundleError, match="no graph for 'tensorrt'; it has: onnxruntime"):
        make(tmp_path / "out", backend="tensorrt")
    assert list(tmp_path.iterdir()) == []


def test_workers_share_the_work_and_change_nothing(make: Make, shards: Shards, tmp_path: Path) -> None:
    make(tmp_path / "one")
    result = make(tmp_path / "two", workers=2, threads=None)
    assert (result.shards, result.images, result.status.missing) == (4, 23, ())
    assert shards(tmp_path / "two") == shards(tmp_path / "one")
    with pytest.raises(InputError, match=r"steps: 2 there, 3 here"):
        make(tmp_path / "two", workers=2, steps=3)


def test_a_job_keeps_its_threads(make: Make, shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenVINO rounds differently with another number of them, so their number must not follow that of the workers."""
    import qdm_deploy.batch.job as module

    monkeypatch.setattr(module, "available_cores", lambda: 6)
    out = tmp_path / "out"
    begun = make(out, threads=None, rank=0, world=4)
    assert begun.status.job.engine["threads"] == 6
    monkeypatch.setattr(module, "available_cores", lambda: 2)
    assert make(out, threads=None, rank=1, world=4).shards == 1
    assert make(out, threads=None, workers=2).status.missing == ()
    with pytest.raises(InputError, match=r"engine\.threads: 6 there, 2 here"):
        make(out, threads=2)
    make(tmp_path / "whole", threads=6)
    assert shards(tmp_path / "whole") == shards(out)
    assert make(tmp_path / "new", threads=None).status.job.engine["threads"] == 2


def test_a_machine_that_comes_second_takes_the_threads_of_the_first(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import qdm_deploy.batch.run as module

    join, out = module.join_job, tmp_path / "out"

    def slower(folder: Path, job: Any) -> None:
        monkeypatch.setattr(module, "join_job", join)
        make(out, threads=3, rank=0, world=4)  # the other machine, just before this one writes its job
        join(folder, job)

    monkeypatch.setattr(module, "join_job", slower)
    assert make(out, threads=None).status.missing == ()
    assert batch_status(out).job.engine["threads"] == 3


def test_damage_is_found_and_made_good(make: Make, shards: Shards, tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(out)
    good = shards(out)
    flipped = out / "shard-00001.tar"
    content = bytearray(flipped.read_bytes())
    content[700] ^= 1
    flipped.write_bytes(content)
    (out / "shard-00002.tar").write_bytes(good["shard-00002.tar"][:-512])
    (out / "shard-00003.json").unlink()
    (out / "extra.tar").write_bytes(b"")
    found = verify_batch(out)
    assert not found.ok
    assert (found.bad, found.images, found.discarded) == ((1, 2, 3), 6, False)
    assert [finding.split(" ", 2)[:2] for finding in found.findings] == [
        ["shard-00001.tar", "has"],
        ["shard-00002.tar", "has"],
        ["shard-00003.tar", "is"],
        ["extra.tar", "is"],
    ]
    assert "pictures 18 to 22 are not there" in found.findings[2]
    # A size that is wrong, or no marker, is seen without reading the shard; a flipped bit is not.
    assert batch_status(out).missing == (2, 3)
    assert verify_batch(out, discard=True).discarded
    assert batch_status(out).missing == (1, 2, 3)
    (out / "extra.tar").unlink()
    assert make(out).shards == 3
    assert shards(out) == good
    assert verify_batch(out).findings == ()


@pytest.mark.parametrize("form", ["webdataset", "npz", "png"])
def test_a_shard_with_a_gap_is_found_even_if_its_hash_is_right(make: Make, tmp_path: Path, form: str) -> None:
    from qdm_deploy.batch.marker import digest_of, size_of

    out = tmp_path / "out"
    make(out, format=form)
    names = [json.loads((out / f"shard-0000{number}.json").read_text())["file"] for number in (0, 1)]
    one, other = (out / name for name in names)
    spare = tmp_path / "spare"
    one.rename(spare)
    other.rename(one)
    spare.rename(other)
    for number, path in ((0, one), (1, other)):
        marker = out / f"shard-0000{number}.json"
        facts = {**json.loads(marker.read_text()), "sha256": digest_of(path), "bytes": size_of(path)}
        marker.write_text(json.dumps(facts))
    assert read_indices(form, one) == list(range(6, 12))  # type: ignore[arg-type]
    assert verify_batch(out).findings[0] == f"{names[0]} holds 6 pictures, and 6 where 0 is expected"
    assert verify_batch(out).bad == (0, 1)


def test_two_machines_that_disagree_are_reported(make: Make, tmp_path: Path) -> None:
    from qdm_deploy.batch.job import read_job
    from qdm_deploy.batch.run import commit

    out = tmp_path / "out"
    make(out)
    job = read_job(out)
    (tmp_path / "mine").write_bytes(b"other bytes")
    with pytest.raises(CheckFailed, match=r"shard-00000\.tar was made twice, with different bytes: here on"):
        commit(out, job, job.shard(0), tmp_path / "mine", "0" * 64, seconds=1.0)
    assert verify_batch(out).ok


def test_a_folder_of_no_job_has_no_status(tmp_path: Path) -> None:
    for look in (batch_status, verify_batch):
        with pytest.raises(InputError, match=r"holds no job\.json: it is not the folder of `qdm-deploy batch`"):
            look(tmp_path)
