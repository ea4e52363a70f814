import os
import re
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from qdm_deploy.artifacts import Bundle, check_bundle
from qdm_deploy.errors import BundleError

ForeignFolder = tuple[Path, Callable[[], AbstractContextManager[None]]]

AGAIN = "build it again with `qdm-deploy build`, or copy it again"


def refused(bundle: Path, *findings: str, sizes: bool = True) -> None:
    """The bundle does not open, and ``check_bundle`` gives just these findings (patterns), in this order."""
    found = check_bundle(bundle)
    assert len(found) == len(findings), found
    for text, pattern in zip(found, findings, strict=True):
        assert re.fullmatch(pattern, text), text
    with pytest.raises(BundleError, match=f"{re.escape(str(bundle))} is not intact: .*{re.escape(AGAIN)}") as caught:
        Bundle.open(bundle)
    assert found[0] in str(caught.value)
    if sizes:
        with pytest.raises(BundleError, match=findings[0]):
            Bundle.open(bundle, check="sizes")
    else:
        Bundle.open(bundle, check="sizes")


def listed_files(bundle: Path) -> list[Path]:
    return sorted(path for path in bundle.rglob("*") if path.is_file())


def test_open(bundle: Path) -> None:
    for check in ("full", "sizes"):
        opened = Bundle.open(bundle, check=check)
        assert opened.path == bundle
        assert re.fullmatch("[0-9a-f]{64}", opened.id)
        assert opened.pipeline.sample_shape == (3, 8, 8)
        assert opened.file("unet/weights.bin").read_bytes() == b"\x00\x7f\x80\xff"
        assert opened.graph("onnxruntime") == bundle / "unet" / "onnxruntime.onnx"
        assert opened.graph("float") == bundle / "unet" / "float.onnx"
        assert opened.scheduler_config() == {"num_train_timesteps": 1000}
    assert check_bundle(bundle) == []


def test_a_copy_has_the_same_id(bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / "copy")
    assert Bundle.open(tmp_path / "copy").id == Bundle.open(bundle).id


def test_a_link_to_a_bundle_is_followed_once(bundle: Path, tmp_path: Path) -> None:
    link = tmp_path / "current"
    link.symlink_to(bundle)
    opened = Bundle.open(link)
    link.unlink()
    assert opened.path == bundle
    assert opened.scheduler_config()


def test_every_flipped_byte_in_every_file_is_refused(bundle: Path) -> None:
    for path in listed_files(bundle):
        good = path.read_bytes()
        for position in range(0, len(good), 1 if len(good) < 100 else 3):
            bad = bytearray(good)
            bad[position] ^= 1 << (position % 8)
            path.write_bytes(bad)
            with pytest.raises(BundleError, match=re.escape(path.name)):
                Bundle.open(bundle)
        path.write_bytes(good)
    assert check_bundle(bundle) == []


def test_a_changed_byte_is_named_with_both_hashes(bundle: Path) -> None:
    (bundle / "unet" / "weights.bin").write_bytes(b"\x00\x7f\x80\xfe")
    refused(bundle, "unet/weights.bin has SHA-256 [0-9a-f]{64}, and [0-9a-f]{64} is expected", sizes=False)


def test_every_truncation_of_every_file_is_refused(bundle: Path) -> None:
    for path in listed_files(bundle):
        good = path.read_bytes()
        for length in range(0, len(good), max(1, len(good) // 50)):
            path.write_bytes(good[:length])
            with pytest.raises(BundleError, match=re.escape(path.name)):
                Bundle.open(bundle, check="sizes")
        path.write_bytes(good)
    assert check_bundle(bundle) == []


def test_a_truncated_and_a_grown_file_are_named_with_both_sizes(bundle: Path) -> None:
    (bundle / "unet" / "float.onnx").write_bytes(b"float")
    (bundle / "unet" / "weights.bin").write_bytes(b"12345")
    refused(
        bundle, "unet/float.onnx has 5 bytes, and 11 are expected", "unet/weights.bin has 5 bytes, and 4 are expected"
    )


def test_every_missing_file_is_refused(bundle: Path, tmp_path: Path) -> None:
    for path in listed_files(bundle):
        path.rename(tmp_path / "away")
        with pytest.raises(BundleError, match=rf"{re.escape(path.name)}( is missing|: it is not a bundle)"):
            Bundle.open(bundle, check="sizes")
        (tmp_path / "away").rename(path)


def test_a_missing_folder_is_one_finding_per_file(bundle: Path) -> None:
    shutil.rmtree(bundle / "unet")
    refused(
        bundle,
        "unet/float.onnx is missing, and 11 bytes are expected",
        "unet/onnxruntime.onnx is missing, and 10 bytes are expected",
        "unet/weights.bin is missing, and 4 bytes are expected",
    )


@pytest.mark.parametrize(
    "name", ["extra.json", "unet/extra.onnx", ".DS_Store", "\x1b[2J", "e\u0301.json", "unet/manifest.json"]
)
def test_an_extra_file_is_refused(bundle: Path, name: str) -> None:
    (bundle / name).write_bytes(b"")
    refused(bundle, rf"{re.escape(ascii(name))} is not listed in manifest\.json; expected: no other file")


def test_an_extra_file_whose_name_is_not_text_is_refused(bundle: Path) -> None:
    Path(os.fsdecode(os.fsencode(bundle) + b"/\xff")).write_bytes(b"")
    refused(bundle, r"'\\udcff' is not listed in manifest\.json; expected: no other file")


def test_an_extra_folder_is_one_finding(bundle: Path) -> None:
    (bundle / "unet" / "extra" / "deep").mkdir(parents=True)
    (bundle / "unet" / "extra" / "file.json").write_bytes(b"")
    refused(bundle, r"'unet/extra' is a folder that manifest\.json does not know; expected: no other folder")


def test_a_folder_in_place_of_a_file_is_refused(bundle: Path) -> None:
    (bundle / "unet" / "weights.bin").unlink()
    (bundle / "unet" / "weights.bin").mkdir()
    refused(bundle, "'unet/weights.bin' is a folder .*")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path, other: path.symlink_to(other), "is a symbolic link; a regular file is expected"),
        (lambda path, other: path.hardlink_to(other), "has 2 hard links; a file with one name is expected"),
        (lambda path, other: os.mkfifo(path), "is a folder, a pipe or a device; a regular file is expected"),
        (lambda path, other: os.mknod(path, 0o20666, os.makedev(1, 3)), "is a folder, a pipe or a device; .*"),
    ],
    ids=["symlink", "hardlink", "fifo", "device"],
)
@pytest.mark.parametrize("name", ["unet/weights.bin", "unet/extra.bin"])
def test_links_and_special_files_are_refused(
    bundle: Path, tmp_path: Path, make: Callable[[Path, Path], object], message: str, name: str
) -> None:
    """Also when the right content is behind them, and also where no file is expected."""
    path, other = bundle / name, tmp_path / "other"
    if path.exists():
        path.rename(other)
    else:
        other.write_bytes(b"")
    try:
        make(path, other)
    except PermissionError as error:
        pytest.skip(f"making a device needs root: {error}")
    refused(bundle, f"'{name}' {message}")


def test_two_files_of_the_bundle_that_are_one_on_disk_are_refused(
    bundle: Path, write_bundle: Callable[..., Path]
) -> None:
    twin = {"unet/onnxruntime.onnx": b"same", "unet/float.onnx": b"same"}
    path = write_bundle(bundle.parent / "twin.qdm", files=twin)
    (path / "unet" / "float.onnx").unlink()
    (path / "unet" / "float.onnx").hardlink_to(path / "unet" / "onnxruntime.onnx")
    refused(path, "'unet/float.onnx' has 2 hard links.*", "'unet/onnxruntime.onnx' has 2 hard links.*")


def test_a_linked_folder_is_refused(bundle: Path, tmp_path: Path) -> None:
    (bundle / "selftest").rename(tmp_path / "selftest")
    (bundle / "selftest").symlink_to(tmp_path / "selftest")
    refused(bundle, "'selftest' is a symbolic link; .*", "selftest/inputs.safetensors is missing, .*")


def test_files_that_cannot_be_read_are_named(
    tmp_path: Path, write_bundle: Callable[..., Path], foreign_folder: ForeignFolder
) -> None:
    folder, unprivileged = foreign_folder
    bundle = folder / "tiny.qdm"
    folder.chmod(0o755)
    write_bundle(bundle)
    (bundle / "unet" / "weights.bin").chmod(0)
    (bundle / "selftest").chmod(0)
    with unprivileged():
        findings = check_bundle(bundle)
    (bundle / "selftest").chmod(0o755)
    assert findings == [
        "'selftest/' cannot be read (Permission denied)",
        "selftest/inputs.safetensors is missing, and 6 bytes are expected",
        "unet/weights.bin cannot be read (Permission denied)",
    ]
    (bundle / "manifest.json").chmod(0)
    with unprivileged(), pytest.raises(BundleError, match=r"manifest\.json cannot be read .Permission denied"):
        Bundle.open(bundle)


def test_check_bundle_finds_everything(bundle: Path) -> None:
    (bundle / "extra.json").write_bytes(b"")
    (bundle / "model_index.json").unlink()
    (bundle / "unet" / "float.onnx").write_bytes(b"short")
    (bundle / "unet" / "weights.bin").write_bytes(b"\x00\x7f\x80\xfe")
    refused(
        bundle,
        "'extra.json' is not listed .*",
        "unet/float.onnx has 5 bytes, .*",
        "model_index.json is missing, .*",
        "unet/weights.bin has SHA-256 .*",
    )


def test_a_file_or_a_graph_that_is_not_there_is_refused_with_what_is(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    for name in ("unet/tensorrt.onnx", "../other.json", "manifest.json"):
        with pytest.raises(
            BundleError, match=rf"has no file '{re.escape(name)}'; it has: model_index\.json, .*weights\.bin"
        ):
            opened.file(name)
    for target in ("tensorrt", "../unet/float", ""):
        with pytest.raises(BundleError, match=f"no graph for '{re.escape(target)}'; it has: float, onnxruntime"):
            opened.graph(target)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON"),
        (b"\xff", "is not JSON"),
        (b"[1]", "holds a list, and an object is expected"),
        (b"[" * 200_000, "is not JSON"),
    ],
)
def test_a_scheduler_config_that_is_no_json_object_is_refused(
    tmp_path: Path, write_bundle: Callable[..., Path], content: bytes, message: str
) -> None:
    files = {"unet/onnxruntime.onnx": b"", "scheduler/scheduler_config.json": content}
    opened = Bundle.open(write_bundle(tmp_path / "b.qdm", files=files))
    with pytest.raises(BundleError, match=rf"scheduler_config\.json {message}"):
        opened.scheduler_config()


def test_a_bundle_without_a_scheduler_config_says_so(tmp_path: Path, write_bundle: Callable[..., Path]) -> None:
    opened = Bundle.open(write_bundle(tmp_path / "b.qdm", files={"unet/onnxruntime.onnx": b""}))
    with pytest.raises(
        BundleError, match=r"has no file 'scheduler/scheduler_config\.json'; it has: unet/onnxruntime\.onnx"
    ):
        opened.scheduler_config()


def test_a_scheduler_config_that_went_away_is_refused(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    (bundle / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(BundleError, match=r"scheduler_config\.json cannot be read .No such file"):
        opened.scheduler_config()
