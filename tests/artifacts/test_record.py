import json
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from qdm_deploy.artifacts import read_record, tool_versions, write_record
from qdm_deploy.errors import InputError, ResourceProblem

DTYPES = [
    *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)),
    "float16",
    "float32",
    "float64",
    "bool",
]
DOCUMENT = {"bins": [0, 500], "name": "Ä", "none": None, "deep": {"gain": 1.25}}


def small(path: Path, **changes: Any) -> Path:
    arguments: dict[str, Any] = {
        "kind": "statistics",
        "version": 2,
        "document": DOCUMENT,
        "arrays": {"x": np.arange(3, dtype=np.float32), "n": np.array([True, False])},
    }
    write_record(path, **(arguments | changes))
    return path


@pytest.fixture
def record(tmp_path: Path) -> Path:
    return small(tmp_path / "r.safetensors")


def read(path: Path) -> tuple[dict[str, object], dict[str, NDArray[Any]]]:
    return read_record(path, kind="statistics", version=2)


def test_round_trip(record: Path) -> None:
    document, arrays = read(record)
    assert document == DOCUMENT
    assert arrays.keys() == {"x", "n"}
    np.testing.assert_array_equal(arrays["x"], np.arange(3, dtype=np.float32))
    arrays["x"][0] = 7  # the caller's own memory, not the file's


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25)
@given(data=st.data())
def test_every_dtype_and_shape_comes_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, dtype: str, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("record") / "r.safetensors"
    shape = arrays_of.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
    array = data.draw(arrays_of.arrays(dtype, shape))
    other = np.arange(5, dtype=np.int8)
    write_record(path, kind="k", version=1, document={}, arrays={"a": array, "other": other})
    loaded = read_record(path, kind="k", version=1)[1]
    assert (loaded["a"].dtype, loaded["a"].shape) == (array.dtype, array.shape)
    assert loaded["a"].tobytes() == array.tobytes()
    np.testing.assert_array_equal(loaded["other"], other)


def test_arrays_may_be_strided_big_endian_read_only_and_not_finite(tmp_path: Path) -> None:
    grid = np.arange(24, dtype=np.float32).reshape(4, 6)
    frozen = np.array([np.nan, np.inf, -np.inf, -0.0])
    frozen.flags.writeable = False
    given_arrays = {
        "transposed": grid.T,
        "every_other": grid[::2, ::-3],
        "big_endian": np.arange(5, dtype=">i4"),
        "frozen": frozen,
        "scalar": np.array(3, dtype=np.int64),
        "empty": np.zeros((0, 3), np.float16),
    }
    loaded = read(small(tmp_path / "r.safetensors", arrays=given_arrays))[1]
    for name, array in given_arrays.items():
        assert loaded[name].shape == array.shape
        np.testing.assert_array_equal(loaded[name], array)
    assert np.signbit(loaded["frozen"][3])


def test_a_record_without_arrays(tmp_path: Path) -> None:
    assert read(small(tmp_path / "r.safetensors", arrays={})) == (DOCUMENT, {})


def test_any_safetensors_reader_opens_it(record: Path) -> None:
    np.testing.assert_array_equal(load_file(record)["x"], [0, 1, 2])


def test_arrays_are_aligned_in_the_file(tmp_path: Path) -> None:
    path = small(
        tmp_path / "r.safetensors", arrays={"a": np.zeros(3, np.int8), "b": np.zeros(2), "c": np.zeros(1, "f2")}
    )
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert length % 8 == 0
    assert [header[name]["data_offsets"] for name in "bca"] == [[0, 16], [16, 18], [18, 21]]


def test_equal_values_give_equal_bytes(tmp_path: Path, record: Path) -> None:
    reordered = small(
        tmp_path / "other.safetensors",
        document=dict(reversed(DOCUMENT.items())),
        arrays={"n": np.array([True, False]), "x": np.arange(3, dtype=np.float32)},
    )
    assert reordered.read_bytes() == record.read_bytes()


def test_memory_holds_an_array_once(tmp_path: Path) -> None:
    array = np.ones((16 << 20,), np.uint8)
    tracemalloc.start()
    path = small(tmp_path / "r.safetensors", arrays={"x": array})
    writing = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    arrays = read(path)[1]
    reading = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert writing < 1 << 20
    assert arrays["x"].nbytes <= reading < 1.1 * arrays["x"].nbytes


def test_the_tools_are_named(record: Path) -> None:
    raw = record.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    tools = json.loads(header["__metadata__"]["qdm_record"])["record"]["tools"]
    assert tools == tool_versions()
    assert tools["numpy"] == np.__version__
    assert tools.keys() >= {"python", "qdm-deploy"}


# ----------------------------------------------------------------------------------------------------------- refusals


def test_every_flipped_byte_is_refused_or_changes_nothing(record: Path) -> None:
    """Only the padding between header and data may hold another white space."""
    good, (document, arrays) = record.read_bytes(), read(record)
    header_end = 8 + int.from_bytes(good[:8], "little")
    padding = range(len(good[:header_end].rstrip(b" ")), header_end)
    for position in range(len(good)):
        for flip in (1 << (position % 8), 0xFF):
            bad = bytearray(good)
            bad[position] ^= flip
            record.write_bytes(bad)
            try:
                found = read(record)
            except InputError:
                continue
            assert position in padding, f"byte {position} changed and was not noticed"
            assert found[0] == document
            assert all(np.array_equal(found[1][name], arrays[name]) for name in arrays)


def test_every_truncation_is_refused(record: Path) -> None:
    good = record.read_bytes()
    for length in range(len(good)):
        record.write_bytes(good[:length])
        with pytest.raises(InputError, match=re.escape(str(record))):
            read(record)


def test_extra_bytes_at_the_end_are_refused(record: Path) -> None:
    record.write_bytes(record.read_bytes() + b"\0")
    with pytest.raises(InputError, match=rf"{record} is damaged .not a complete safetensors file.*copy it again"):
        read(record)


def test_another_kind_is_refused(record: Path) -> None:
    with pytest.raises(InputError, match=rf"{record} holds 'statistics', and 'plan' is expected"):
        read_record(record, kind="plan", version=2)


@pytest.mark.parametrize(("reads", "advice"), [(1, "update qdm-deploy"), (3, "make it again")])
def test_another_version_is_refused(record: Path, reads: int, advice: str) -> None:
    with pytest.raises(InputError, match=rf"is version 2 of 'statistics', and .* reads version {reads}: {advice}"):
        read_record(record, kind="statistics", version=reads)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path, cause in ((tmp_path / "none.safetensors", "No such file"), (tmp_path, "")):
        with pytest.raises(InputError, match=rf"{path} cannot be read: .*{cause}"):
            read(path)


def test_a_file_of_somebody_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"w": np.zeros(3)}, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"{path} is not a file that qdm-deploy wrote.*'qdm_record'"):
        read(path)
    save_file({"w": np.zeros(3)}, path)
    with pytest.raises(InputError, match=rf"{path} is not a file that qdm-deploy wrote"):
        read(path)


@pytest.mark.parametrize(
    "metadata",
    [
        "not JSON",
        "[]",
        "{}",
        '{"record": {}}',
        '{"record": 1, "sha256": ""}',
        '{"record": {"kind": "statistics", "version": "2", "tools": {}, "document": {}, "arrays": {}}, "sha256": ""}',
        "[" * 100_000,
    ],
)
def test_metadata_that_is_no_record_is_refused(tmp_path: Path, metadata: str) -> None:
    path = tmp_path / "r.safetensors"
    save_file({"w": np.zeros(3)}, path, metadata={"qdm_record": metadata})
    with pytest.raises(InputError, match=rf"{path} is damaged .its metadata 'qdm_record' is not a record"):
        read(path)


def metadata_of(path: Path) -> dict[str, str]:
    raw = path.read_bytes()
    metadata: dict[str, str] = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    return metadata


def test_a_changed_document_is_refused(record: Path) -> None:
    metadata = {"qdm_record": metadata_of(record)["qdm_record"].replace("1.25", "1.26")}
    save_file(load_file(record), record, metadata=metadata)
    with pytest.raises(InputError, match=rf"{record} is damaged .*differs from its SHA-256"):
        read(record)


def test_a_changed_missing_or_extra_array_is_refused(record: Path) -> None:
    metadata, arrays = metadata_of(record), load_file(record)
    for changed, cause in (
        ({"x": arrays["x"] + 1}, "the array 'x' differs"),
        ({"x": arrays["x"].view(np.int32)}, "the array 'x' differs"),
        ({"x": arrays["x"][:, None]}, "the array 'x' differs"),
        ({"y": arrays["x"]}, r"it holds the arrays \['n', 'x', 'y'\], and \['n', 'x'\] are expected"),
    ):
        save_file(arrays | changed, record, metadata=metadata)
        with pytest.raises(InputError, match=f"{record} is damaged .{cause}"):
            read(record)
    save_file({"x": arrays["x"]}, record, metadata=metadata)
    with pytest.raises(InputError, match=r"it holds the arrays \['x'\], and \['n', 'x'\] are expected"):
        read(record)


def test_what_cannot_be_written_is_refused_and_leaves_the_old_record(record: Path) -> None:
    good = record.read_bytes()
    for changes, message in (
        ({"document": {"psnr": float("nan")}}, r"document\.psnr is nan"),
        ({"arrays": {"c": np.zeros(2, np.complex64)}}, "the array 'c' is complex64; allowed: float64"),
        ({"arrays": {"o": np.array([None])}}, "the array 'o' is object"),
        ({"arrays": {"__metadata__": np.zeros(2)}}, "'__metadata__' is reserved"),
        ({"version": 0}, "version"),
    ):
        with pytest.raises(ValueError, match=message):
            small(record, **changes)
    assert record.read_bytes() == good
    assert list(record.parent.iterdir()) == [record]


def test_a_full_disk_leaves_the_old_record(tmp_path: Path, mount: Callable[[Path, str], Path]) -> None:
    record = small(mount(tmp_path / "disk", "size=64k") / "r.safetensors")
    with pytest.raises(ResourceProblem, match=r"r\.safetensors cannot be written .No space left.*MiB are free"):
        small(record, arrays={"x": np.zeros(100_000)})
    assert list(record.parent.iterdir()) == [record]
    assert read(record)[0] == DOCUMENT
