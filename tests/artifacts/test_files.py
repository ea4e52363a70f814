import hashlib
import os
import re
import tracemalloc
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qdm_deploy.artifacts.files import canonical_json, new_directory, new_file, open_plain_file, plain_json, sha256_of
from qdm_deploy.errors import EnvironmentProblem, InputError, ResourceProblem

ForeignFolder = tuple[Path, Callable[[], AbstractContextManager[None]]]

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


# ------------------------------------------------------------------------------------------------------------ hashing


def test_sha256_of_known_answer(tmp_path: Path) -> None:
    path = tmp_path / "abc"
    path.write_bytes(b"abc")
    assert sha256_of(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize("size", [0, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 3 << 20])
def test_sha256_of_reads_every_chunk(tmp_path: Path, size: int) -> None:
    content = np.random.default_rng(size).bytes(size)
    path = tmp_path / "file"
    path.write_bytes(content)
    assert sha256_of(path) == hashlib.sha256(content).hexdigest()


def test_sha256_of_holds_one_chunk_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with open(path, "wb") as stream:
        stream.truncate(32 << 20)
    tracemalloc.start()
    sha256_of(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 << 20


def test_open_plain_file_reads_a_regular_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    with open_plain_file(tmp_path / "file") as stream:
        assert stream.read() == b"content"


def test_open_plain_file_refuses_links_pipes_and_devices(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "symbolic").symlink_to("file")
    (tmp_path / "hard").hardlink_to(tmp_path / "file")
    os.mkfifo(tmp_path / "pipe")
    for name, cause in {"symbolic": "symbolic link", "hard": "2 hard links", "pipe": "pipe"}.items():
        with pytest.raises(OSError, match=f"{cause}.*{name}"):
            open_plain_file(tmp_path / name)
    with pytest.raises(OSError, match=r"device.*/dev/null"):
        open_plain_file(Path("/dev/null"))


# --------------------------------------------------------------------------------------------------------------- JSON


def test_canonical_json_known_answer() -> None:
    assert canonical_json({"b": (1, 2.5), "a": "é", "c": None}) == '{"a":"é","b":[1,2.5],"c":null}'.encode()
    assert canonical_json(MappingProxyType({"b": True})) == b'{"b":true}'


@settings(max_examples=30)
@given(st.dictionaries(st.text(), JSON_VALUES))
def test_canonical_json_ignores_the_order_of_keys(value: dict[str, object]) -> None:
    assert canonical_json(dict(reversed(value.items()))) == canonical_json(value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"psnr": [1.0, float("inf")]}, r"value\.psnr\[1\] is inf"),
        ({"psnr": float("nan")}, r"value\.psnr is nan"),
        ({"bins": {3: 1}}, r"value\.bins has the key 3; .*str\(key\)"),
        ({"scale": np.float32(1)}, r"value\.scale is a float32; allowed: text"),
        ({"raw": b"bytes"}, r"value\.raw is a bytes"),
        ({"name": "\ud800"}, r"value\.name is '\\ud800', which is not valid Unicode"),
        ({"\ud800": 1}, r"a key of value is '\\ud800'"),
    ],
)
def test_plain_json_names_the_place_of_what_json_cannot_hold(value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plain_json(value)


# ---------------------------------------------------------------------------------------------------------- new_file


def test_new_file_replaces_the_old_one_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "made" / "file"
    for content in (b"first", b"second"):
        with new_file(path) as temporary:
            temporary.write_bytes(content)
            assert temporary.parent == path.parent
            assert not path.exists() or path.read_bytes() == b"first"
        assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


def test_new_file_has_the_permissions_of_an_ordinary_file(tmp_path: Path) -> None:
    (tmp_path / "ordinary").write_bytes(b"")
    with new_file(tmp_path / "file") as temporary:
        temporary.write_bytes(b"")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_new_file_keeps_the_old_one_on_an_error(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail() -> None:
        with new_file(path) as temporary:
            temporary.write_bytes(b"half")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_new_file_never_replaces_a_folder_a_link_or_a_device(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    before = sorted(tmp_path.iterdir())
    for path in before:
        with (
            pytest.raises(InputError, match=rf"{re.escape(str(path))} is a folder, a link or a device"),
            new_file(path),
        ):
            pass
    assert sorted(tmp_path.iterdir()) == before


def test_new_file_allows_the_longest_name(tmp_path: Path) -> None:
    name = "😀" * 63  # 252 bytes of the 255 that a name may have
    with new_file(tmp_path / name) as temporary:
        temporary.write_bytes(b"content")
    assert (tmp_path / name).read_bytes() == b"content"


def test_new_file_refuses_a_name_that_is_too_long(tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match=r"x{300} cannot be made .File name too long.*choose another name"),
        new_file(tmp_path / ("x" * 300)) as temporary,
    ):
        temporary.write_bytes(b"content")
    assert list(tmp_path.iterdir()) == []


def test_new_file_on_a_full_disk(tmp_path: Path, mount: Callable[[Path, str], Path]) -> None:
    disk = mount(tmp_path / "disk", "size=64k")

    def write(size: int) -> None:
        with new_file(disk / "file") as temporary:
            temporary.write_bytes(b"x" * size)

    write(1000)
    with pytest.raises(
        ResourceProblem, match=r"disk/file cannot be written .No space left.* 0\.\d MiB are free in .*disk"
    ):
        write(100_000)
    assert [path.name for path in disk.iterdir()] == ["file"]
    assert (disk / "file").read_bytes() == b"x" * 1000


# ------------------------------------------------------------------------------------------------------ new_directory


def test_new_directory_appears_complete(tmp_path: Path) -> None:
    path = tmp_path / "made" / "folder"
    with new_directory(path) as root:
        (root / "inner").mkdir()
        (root / "inner" / "file").write_bytes(b"content")
        assert not path.exists()
    assert (path / "inner" / "file").read_bytes() == b"content"
    assert list(path.parent.iterdir()) == [path]


def test_new_directory_has_the_permissions_of_an_ordinary_folder(tmp_path: Path) -> None:
    (tmp_path / "ordinary").mkdir()
    with new_directory(tmp_path / "folder"):
        pass
    assert (tmp_path / "folder").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_new_directory_leaves_nothing_on_an_error(tmp_path: Path, error: type[BaseException]) -> None:
    def fail() -> None:
        with new_directory(tmp_path / "folder") as root:
            (root / "file").write_bytes(b"half")
            raise error

    with pytest.raises(error):
        fail()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("force", [False, True])
def test_new_directory_keeps_what_is_not_an_empty_folder(tmp_path: Path, force: bool) -> None:
    (tmp_path / "file").write_bytes(b"precious")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_bytes(b"precious")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    before = sorted(tmp_path.rglob("*"))
    for name in ("file", "folder", "link"):
        with (
            pytest.raises(InputError, match=re.escape(str(tmp_path / name))),
            new_directory(tmp_path / name, force=force),
        ):
            pytest.fail("the work must not begin")
    assert sorted(tmp_path.rglob("*")) == before


def test_new_directory_says_how_to_replace(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"{re.escape(str(tmp_path))} exists: choose another name.*--force"):
        new_directory(tmp_path).__enter__()


def test_new_directory_replaces_an_empty_folder_by_force(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with new_directory(tmp_path / "folder", force=True) as root:
        (root / "file").write_bytes(b"content")
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "file"]


@pytest.mark.parametrize("force", [False, True])
def test_new_directory_keeps_what_appeared_meanwhile(tmp_path: Path, force: bool) -> None:
    path = tmp_path / "folder"

    def race() -> None:
        with new_directory(path, force=force) as root:
            (root / "file").write_bytes(b"ours")
            path.mkdir()
            (path / "file").write_bytes(b"theirs")

    with pytest.raises(InputError, match=re.escape(str(path))):
        race()
    assert [item.name for item in tmp_path.iterdir()] == ["folder"]
    assert (path / "file").read_bytes() == b"theirs"


def test_new_directory_says_where_the_replaced_folder_is_when_it_cannot_be_removed(
    tmp_path: Path, mount: Callable[[Path, str], Path]
) -> None:
    path = tmp_path / "folder"
    mount(path / "busy", "size=64k")
    with (
        pytest.raises(
            EnvironmentProblem, match=r"folder is complete, but what it replaced is still at .*\.folder\.old-"
        ),
        new_directory(path, force=True, may_replace=lambda _: None) as root,
    ):
        (root / "file").write_bytes(b"new")
    assert (path / "file").read_bytes() == b"new"


def test_new_directory_puts_the_old_folder_back_when_the_new_one_cannot_take_its_place(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    (path / "file").write_bytes(b"old")

    def lose_the_new_folder() -> None:
        with new_directory(path, force=True, may_replace=lambda _: remove_new() if asked else asked.append(1)) as root:
            roots.append(root)

    def remove_new() -> None:
        roots[0].rmdir()

    roots: list[Path] = []
    asked: list[int] = []
    with pytest.raises(FileNotFoundError, match=r"\.folder\.tmp-"):
        lose_the_new_folder()
    assert (path / "file").read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_new_directory_on_a_full_disk(tmp_path: Path, mount: Callable[[Path, str], Path]) -> None:
    disk = mount(tmp_path / "disk", "size=64k")
    with (
        pytest.raises(
            ResourceProblem, match=r"disk/folder cannot be written .No space left.*MiB are free in .*disk; free"
        ),
        new_directory(disk / "folder") as root,
    ):
        (root / "file").write_bytes(b"x" * 100_000)
    assert list(disk.iterdir()) == []


def test_new_directory_on_a_disk_without_a_free_inode(tmp_path: Path, mount: Callable[[Path, str], Path]) -> None:
    disk = mount(tmp_path / "disk", "size=64k,nr_inodes=1")
    with pytest.raises(ResourceProblem, match=r"disk/folder cannot be written"), new_directory(disk / "folder"):
        pytest.fail("the work must not begin")


def test_a_read_only_disk_is_refused_before_the_work(tmp_path: Path, mount: Callable[[Path, str], Path]) -> None:
    disk = mount(tmp_path / "disk", "size=64k,ro")
    for make in (new_directory, new_file):
        with (
            pytest.raises(EnvironmentProblem, match=r"disk/out cannot be written .Read-only.*that you may write to"),
            make(disk / "out"),
        ):
            pytest.fail("the work must not begin")


def test_a_folder_without_permission_is_refused_before_the_work(foreign_folder: ForeignFolder) -> None:
    folder, unprivileged = foreign_folder
    for make in (new_directory, new_file):
        with (
            unprivileged(),
            pytest.raises(EnvironmentProblem, match=rf"{folder}/out cannot be written .Permission denied"),
            make(folder / "out"),
        ):
            pytest.fail("the work must not begin")


def test_a_file_in_place_of_the_parent_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"precious")
    for make in (new_directory, new_file):
        for path in (tmp_path / "file" / "out", tmp_path / "file" / "deep" / "out"):
            with pytest.raises(InputError, match=rf"{path} cannot be made"), make(path):
                pytest.fail("the work must not begin")
    assert (tmp_path / "file").read_bytes() == b"precious"


def test_an_error_that_has_no_better_name_passes_unchanged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file of the user"), new_directory(tmp_path / "folder"):
        raise FileNotFoundError(2, "no such file of the user")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_removed_is_noted_on_the_error(tmp_path: Path, mount: Callable[[Path, str], Path]) -> None:
    def fail() -> None:
        with new_directory(tmp_path / "folder") as root:
            mount(root / "busy", "size=64k")
            raise RuntimeError("the cause")

    with pytest.raises(RuntimeError, match="the cause") as caught:
        fail()
    assert re.search(r"\.folder\.tmp-\w+ could not be removed .*busy", "".join(caught.value.__notes__))
