import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest

from qdm_deploy.artifacts import Bundle, BundleWriter, Manifest, PipelineSpec, check_bundle
from qdm_deploy.artifacts.pipeline_spec import Denoiser, LabelTable
from qdm_deploy.artifacts.step_interface import StepInterface, TensorSpec
from qdm_deploy.errors import BundleError, EnvironmentProblem, InputError, ResourceProblem

Fill = Callable[..., None]
Publish = Callable[..., Manifest]
Write = Callable[..., Path]


def test_a_bundle_appears_complete(tmp_path: Path, fill_bundle: Fill, publish_bundle: Publish) -> None:
    path = tmp_path / "made" / "tiny.qdm"
    with BundleWriter(path) as writer:
        fill_bundle(writer.root)
        manifest = publish_bundle(writer)
        assert not path.exists()
    assert Bundle.open(path).id == manifest.bundle_id
    assert Bundle.open(path).manifest == manifest
    assert list(path.parent.iterdir()) == [path]


def test_equal_content_gives_an_equal_id(tmp_path: Path, write_bundle: Write) -> None:
    noon = datetime(2026, 1, 31, 12, tzinfo=UTC)
    same = datetime(2026, 1, 31, 13, tzinfo=timezone(timedelta(hours=1)))
    ids = [Bundle.open(write_bundle(tmp_path / name, created=at)).id for name, at in (("a", noon), ("b", same))]
    assert ids[0] == ids[1]
    assert Bundle.open(tmp_path / "a").manifest.created == "2026-01-31T12:00:00Z"
    for change in ({"name": "other"}, {"recipe": {"bits": 8}}, {"created": noon + timedelta(seconds=1)}):
        other = write_bundle(tmp_path / "other", force=True, **({"created": noon} | change))
        assert Bundle.open(other).id != ids[0]


def test_the_manifest_spells_out_defaults(bundle: Path) -> None:
    assert b'"learned_variance": false' in (bundle / "manifest.json").read_bytes()


# --------------------------------------------------------------------------------------------- interrupted and refused


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_error_leaves_nothing(
    tmp_path: Path, fill_bundle: Fill, publish_bundle: Publish, published: bool, error: type[BaseException]
) -> None:
    def fail() -> None:
        with BundleWriter(tmp_path / "tiny.qdm") as writer:
            fill_bundle(writer.root)
            if published:
                publish_bundle(writer)
            raise error

    with pytest.raises(error):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_leaving_without_publish_leaves_nothing(tmp_path: Path, fill_bundle: Fill) -> None:
    with BundleWriter(tmp_path / "tiny.qdm") as writer:
        fill_bundle(writer.root)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_removed_without_publish_is_an_error(tmp_path: Path, mount: Callable[[Path, str], Path]) -> None:
    with pytest.raises(OSError, match="busy"), BundleWriter(tmp_path / "tiny.qdm") as writer:
        mount(writer.root / "mounted", "size=64k")


CHILD = """
import sys, time
from pathlib import Path
from qdm_deploy.artifacts import BundleWriter, Compatibility, PipelineSpec
from qdm_deploy.artifacts.pipeline_spec import Denoiser
from qdm_deploy.artifacts.step_interface import StepInterface

DENOISER = Denoiser(interface=StepInterface.of((3, 8, 8), coefficients=13), num_train_timesteps=1000)

out, stage, rounds = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
for _ in range(rounds):
    with BundleWriter(out, force=True) as writer:
        (writer.root / "unet").mkdir()
        for name in ("float.onnx", "onnxruntime.onnx"):
            (writer.root / "unet" / name).write_bytes(b"x" * 100_000)
        if stage == "writing":
            print("ready", flush=True)
            time.sleep(600)
        writer.publish(
            name="tiny",
            pipeline=PipelineSpec(name="tiny", components=(DENOISER,)),
            targets=["onnxruntime"],
            compatibility=Compatibility(opset=21, min_runtime="0.1"),
            provenance={},
            recipe={},
        )
        if stage == "published":
            print("ready", flush=True)
            time.sleep(600)
    print("ready", flush=True)
"""


def child(out: Path, stage: str, rounds: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, str(out), stage, str(rounds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_until_ready(process: subprocess.Popen[str]) -> None:
    if process.stdout is None or process.stdout.readline() != "ready\n":
        pytest.fail(f"the child did not start: {process.communicate()[1]}")


@pytest.mark.parametrize("stage", ["writing", "published"])
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_process_leaves_the_final_name_as_it_was(
    tmp_path: Path, write_bundle: Write, stage: str, sent: signal.Signals
) -> None:
    new, old = tmp_path / "new.qdm", write_bundle(tmp_path / "old.qdm")
    before = Bundle.open(old).id
    processes = [child(path, stage, 1) for path in (new, old)]
    for process in processes:
        wait_until_ready(process)
        process.send_signal(sent)
        process.communicate()
        assert process.returncode == -sent
    with pytest.raises(BundleError, match="is not a folder"):
        Bundle.open(new)
    assert Bundle.open(old).id == before
    left = sorted(path.name for path in tmp_path.iterdir() if path != old)
    if sent == signal.SIGINT:
        assert left == []
    else:
        assert [re.fullmatch(r"\.(new|old)\.qdm\.tmp-\w{8}", name) is not None for name in left] == [True, True]
        assert check_bundle(write_bundle(new)) == []  # what is left does not stand in the way


def test_kill_at_any_time_never_leaves_a_damaged_bundle(tmp_path: Path) -> None:
    out = tmp_path / "tiny.qdm"
    delays = random.Random(0)
    for _ in range(5):
        with child(out, "loop", 100_000) as process:
            wait_until_ready(process)
            time.sleep(delays.uniform(0, 0.05))
            process.kill()
        # Killed between the two renames, the old bundle is complete under its temporary name.
        kept = [out] if out.exists() else list(tmp_path.glob(".tiny.qdm.old-*"))
        assert [check_bundle(path) for path in kept[-1:]] == [[]]


def test_a_full_disk_leaves_nothing(
    tmp_path: Path, fill_bundle: Fill, publish_bundle: Publish, mount: Callable[[Path, str], Path]
) -> None:
    disk = mount(tmp_path / "disk", "size=64k")

    def write(size: int) -> None:
        with BundleWriter(disk / "tiny.qdm") as writer:
            fill_bundle(writer.root, {"unet/onnxruntime.onnx": b"x" * size})
            publish_bundle(writer)

    # The first does not fit; the second leaves no room for the manifest.
    for size in (100_000, 65_536):
        with pytest.raises(
            ResourceProblem, match=r"disk/tiny\.qdm cannot be written .No space left.* 0\.\d MiB are free"
        ):
            write(size)
        assert list(disk.iterdir()) == []
    write(1000)
    assert check_bundle(disk / "tiny.qdm") == []


def test_a_place_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, mount: Callable[[Path, str], Path]
) -> None:
    disk = mount(tmp_path / "disk", "size=64k,ro")
    with pytest.raises(EnvironmentProblem, match=r"disk/tiny\.qdm cannot be written .Read-only"):
        BundleWriter(disk / "tiny.qdm").__enter__()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match=r"file/tiny\.qdm cannot be made .(Not a directory|File exists).*file"):
        BundleWriter(tmp_path / "file" / "tiny.qdm").__enter__()


# -------------------------------------------------------------------------------------------------------------- force


def test_an_existing_bundle_is_replaced_by_force_only(bundle: Path, write_bundle: Write) -> None:
    before = Bundle.open(bundle).id
    with pytest.raises(InputError, match=rf"{re.escape(str(bundle))} exists: choose another name, .*--force"):
        write_bundle(bundle, name="new")
    assert Bundle.open(bundle).id == before
    write_bundle(bundle, name="new", force=True)
    assert Bundle.open(bundle).manifest.name == "new"
    assert list(bundle.parent.iterdir()) == [bundle]


def test_an_error_keeps_the_bundle_that_was_to_be_replaced(bundle: Path, fill_bundle: Fill) -> None:
    before = Bundle.open(bundle).id

    def fail() -> None:
        with BundleWriter(bundle, force=True) as writer:
            fill_bundle(writer.root)
            raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        fail()
    assert Bundle.open(bundle).id == before
    assert list(bundle.parent.iterdir()) == [bundle]


def test_force_replaces_an_empty_folder(tmp_path: Path, write_bundle: Write) -> None:
    (tmp_path / "empty").mkdir()
    assert check_bundle(write_bundle(tmp_path / "empty", force=True)) == []


def test_force_replaces_a_bundle_with_damaged_or_missing_files(bundle: Path, write_bundle: Write) -> None:
    (bundle / "unet" / "weights.bin").unlink()
    (bundle / "unet" / "float.onnx").write_bytes(b"damaged")
    assert check_bundle(write_bundle(bundle, force=True)) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("photo.png", b"precious", r"is not a bundle that can be recognised .*has no manifest\.json"),
        (
            "manifest.json",
            b'{"manifest_version": 3, "name": "an extension"}',
            "is not a bundle .*schema_version is None",
        ),
        ("manifest.json", b"", "is not a bundle .*is not JSON"),
    ],
)
def test_force_never_removes_another_folder(
    tmp_path: Path, write_bundle: Write, name: str, content: bytes, message: str
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"mine {message}.*not replaced: remove it yourself"):
        write_bundle(tmp_path / "mine", force=True)
    assert (tmp_path / "mine" / name).read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("name", ["notes.txt", "unet/notes.txt", "mine/notes.txt"])
def test_force_never_removes_a_bundle_with_somebodys_file_in_it(bundle: Path, write_bundle: Write, name: str) -> None:
    (bundle / name).parent.mkdir(exist_ok=True)
    (bundle / name).write_bytes(b"precious")
    with pytest.raises(
        InputError, match=r"holds '(unet/|mine)?.*', which is not part of the bundle, so it is not replaced"
    ):
        write_bundle(bundle, force=True)
    assert (bundle / name).read_bytes() == b"precious"


def test_force_never_replaces_a_link_to_a_bundle(bundle: Path, write_bundle: Write) -> None:
    link = bundle.parent / "current"
    link.symlink_to(bundle)
    with pytest.raises(InputError, match=r"current exists and is not a folder"):
        write_bundle(link, force=True)
    assert link.is_symlink()


def test_a_file_that_appears_in_the_old_bundle_meanwhile_is_kept(
    bundle: Path, fill_bundle: Fill, publish_bundle: Publish
) -> None:
    def race() -> None:
        with BundleWriter(bundle, force=True) as writer:
            fill_bundle(writer.root)
            publish_bundle(writer)
            (bundle / "notes.txt").write_bytes(b"precious")

    with pytest.raises(InputError, match=r"holds 'notes\.txt'"):
        race()
    assert (bundle / "notes.txt").read_bytes() == b"precious"
    assert list(bundle.parent.iterdir()) == [bundle]


# ------------------------------------------------------------------------------------------------------------ publish


@pytest.mark.parametrize(
    ("add", "message"),
    [
        (
            lambda root: (root / "link.json").symlink_to(root / "model_index.json"),
            "'link.json' .*it is a symbolic link",
        ),
        (
            lambda root: (root / "twin.json").hardlink_to(root / "model_index.json"),
            "'model_index.json' .*it has 2 hard",
        ),
        (lambda root: os.mkfifo(root / "pipe.json"), "'pipe.json' .*it is a folder, a pipe or a device"),
        (lambda root: (root / "model.engine").write_bytes(b""), r"'model.engine' .*no kind of file.*allowed: \*\.bin"),
        (lambda root: (root / "weights.pt").write_bytes(b""), "'weights.pt' .*no kind of file"),
        (lambda root: (root / "a b.json").write_bytes(b""), "'a b.json' .*has the part 'a b.json'"),
        (lambda root: (root / "e\u0301.json").write_bytes(b""), r"'e\\u0301.json' .*has the part"),
        (lambda root: (root / "Model_index.json").write_bytes(b""), "differ in upper and lower case only"),
        (lambda root: (root / "manifest.json").write_bytes(b""), "manifest.json is listed twice, or is the manifest"),
        (lambda root: (root / "empty").mkdir(), "cannot be published: 'empty' is a folder"),
    ],
)
def test_what_may_not_be_in_a_bundle_is_not_published(
    tmp_path: Path, fill_bundle: Fill, publish_bundle: Publish, add: Callable[[Path], object], message: str
) -> None:
    def write() -> None:
        with BundleWriter(tmp_path / "tiny.qdm") as writer:
            fill_bundle(writer.root)
            add(writer.root)
            publish_bundle(writer)

    with pytest.raises(BundleError, match=message):
        write()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"targets": ["tensorrt"]}, BundleError, r"tiny\.qdm cannot be published, targets .*missing: \['tensorrt'\]"),
        ({"name": ""}, BundleError, "cannot be published, name: "),
        ({"provenance": {"psnr": float("inf")}}, ValueError, r"provenance\.psnr is inf"),
        ({"recipe": {1: 2}}, ValueError, "recipe has the key 1"),
    ],
)
def test_values_that_do_not_fit_are_not_published(
    tmp_path: Path, write_bundle: Write, changes: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        write_bundle(tmp_path / "tiny.qdm", **changes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", ["edit", "add", "remove"])
def test_a_change_after_publish_is_refused(
    tmp_path: Path, fill_bundle: Fill, publish_bundle: Publish, change: str
) -> None:
    def write() -> None:
        with BundleWriter(tmp_path / "tiny.qdm") as writer:
            fill_bundle(writer.root)
            publish_bundle(writer)
            if change == "remove":
                (writer.root / "model_index.json").unlink()
            else:
                (writer.root / ("extra.json" if change == "add" else "model_index.json")).write_bytes(b"longer")

    with pytest.raises(BundleError, match=r"changed after publish: '?(model_index|extra)\.json.*Call publish last"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_publish_twice_is_refused(tmp_path: Path, fill_bundle: Fill, publish_bundle: Publish) -> None:
    with BundleWriter(tmp_path / "tiny.qdm") as writer:
        fill_bundle(writer.root)
        publish_bundle(writer)
        with pytest.raises(ValueError, match="publish was called already"):
            publish_bundle(writer)


def test_the_root_exists_inside_the_block_only(tmp_path: Path) -> None:
    writer = BundleWriter(tmp_path / "tiny.qdm")
    with pytest.raises(ValueError, match=r"BundleWriter\.root exists inside its `with` block only"):
        _ = writer.root
    with writer:
        assert writer.root.is_dir()
    with pytest.raises(ValueError, match="inside its `with` block only"):
        _ = writer.root


def test_the_pipeline_comes_back(tmp_path: Path, write_bundle: Write) -> None:
    interface = StepInterface.of((4, 8, 8), [TensorSpec(name="class_labels", dtype="int64")], coefficients=13)
    denoiser = Denoiser(interface=interface, num_train_timesteps=1000, limits={"class_labels": 3})
    labels = LabelTable(input="class_labels", num_classes=2, labels=("cat", "Hündin"), null_label=2)
    pipeline = PipelineSpec(name="cond", components=(denoiser, labels), makes="latents")
    assert Bundle.open(write_bundle(tmp_path / "cond.qdm", pipeline=pipeline)).pipeline == pipeline
