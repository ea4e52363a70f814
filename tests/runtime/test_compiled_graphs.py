"""OpenVINO's compiled graphs on disk: found again, never trusted when damaged, never in the way."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qdm_deploy.backends.openvino.compiled_graphs import CompiledGraphs
from qdm_deploy.backends.openvino.graph import import_openvino
from qdm_deploy.backends.openvino.session import OpenVinoSession
from qdm_deploy.errors import BundleError
from tests.runtime.test_sessions import inputs_for

IDENTITY = {"graph": "abc", "version": "1"}


def files(root: Path) -> list[Path]:
    return sorted(root.glob("*.compiled"))


def test_what_was_stored_is_found_by_identity_and_rows(tmp_path: Path) -> None:
    CompiledGraphs(IDENTITY, tmp_path).store(4, 1, b"four")
    again = CompiledGraphs(IDENTITY, tmp_path)
    assert again.load(4, 1) == b"four"
    assert again.load(5, 1) is None
    assert CompiledGraphs({**IDENTITY, "version": "2"}, tmp_path).load(4, 1) is None


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:-1] + b"\0", lambda data: b""])
def test_a_damaged_file_is_removed_and_not_returned(tmp_path: Path, damage: Any) -> None:
    graphs = CompiledGraphs(IDENTITY, tmp_path)
    graphs.store(4, 1, b"four")
    (path,) = files(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    assert graphs.load(4, 1) is None
    assert not path.exists()


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    graphs = CompiledGraphs(IDENTITY, tmp_path, max_bytes=2 * (32 + 100))
    for rows in (1, 2):
        graphs.store(rows, 1, bytes(100))
    for age, rows in enumerate((1, 2)):
        os.utime(graphs._path(rows, 1), (1000 + age, 1000 + age))  # type: ignore[arg-type]
    assert graphs.load(1, 1) is not None  # used last now
    graphs.store(3, 1, bytes(100))
    assert [graphs.load(rows, 1) is not None for rows in (1, 2, 3)] == [True, False, True]


def test_a_folder_that_others_can_write_to_is_not_used(tmp_path: Path) -> None:
    root = tmp_path / "shared"
    root.mkdir()
    root.chmod(0o777)
    graphs = CompiledGraphs(IDENTITY, root)
    graphs.store(4, 1, b"four")
    assert graphs.load(4, 1) is None
    assert files(root) == []


def test_a_cache_that_cannot_be_made_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    graphs = CompiledGraphs(IDENTITY, tmp_path / "file" / "below")
    graphs.store(4, 1, b"four")
    assert graphs.load(4, 1) is None


def test_a_second_session_does_not_compile_and_computes_the_same(
    labelled: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QDM_CACHE_DIR", str(tmp_path))
    given = inputs_for(3, conditional=True)
    with OpenVinoSession(labelled.graph, threads=1, identity="a bundle") as session:
        first = session.run(given).x0.copy()
    assert len(files(tmp_path / "openvino")) == 1

    def refuse(*arguments: Any) -> Any:
        raise AssertionError("compiled again")

    monkeypatch.setattr(import_openvino().Core, "compile_model", refuse)
    with OpenVinoSession(labelled.graph, threads=1, identity="a bundle") as session:
        np.testing.assert_array_equal(session.run(given).x0, first)
    with (
        OpenVinoSession(labelled.graph, threads=2, identity="a bundle") as session,
        pytest.raises(BundleError, match="compiled again"),
    ):
        session.run(given)


def test_a_stored_graph_that_openvino_refuses_is_compiled_again(
    labelled: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QDM_CACHE_DIR", str(tmp_path))
    given = inputs_for(3, conditional=True)
    with OpenVinoSession(labelled.graph, threads=1) as session:
        expected = session.run(given).x0.copy()
    assert not (tmp_path / "openvino").exists()  # without an identity nothing is kept
    with OpenVinoSession(labelled.graph, threads=1, identity="a bundle") as session:
        assert session._compiled is not None
        session._compiled.store(3, 1, b"of another version")
        np.testing.assert_array_equal(session.run(given).x0, expected)
        assert session._compiled.load(3, 1) != b"of another version"
