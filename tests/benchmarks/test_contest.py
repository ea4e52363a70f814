"""A contest: what is prepared in a folder is all that timing needs, and rows compare with the first contender."""

import json
from pathlib import Path
from typing import Any

import pytest
from lib import contest as module
from lib.case import Case, write_float
from lib.contest import Contender, Missing, contest, contest_parser, wanted
from lib.sessions import Opening


def entrants(model: Case, folder: Path) -> dict[str, Contender]:
    def missing() -> Opening:
        raise Missing("pip install it")

    graph = write_float(model, folder / "float")
    return {
        "float": Contender(lambda: Opening("onnxruntime", graph, {"threads": 1})),
        "not here": Contender(missing),
        "five rows": Contender(lambda: Opening("onnxruntime", graph, {"threads": 1}), rows=5),
        "numbers only": Contender(
            lambda: Opening("onnxruntime", graph, {}), timed=False, facts=lambda: {"kernels": 7}
        ),
    }  # fmt: skip


def test_a_prepared_folder_is_timed_without_the_model(
    labels: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = contest_parser("", models="tiny", runs=3)
    monkeypatch.setattr(module, "case_to_time", lambda name: labels)
    contest("try", arguments.parse_args(["--prepare", str(tmp_path / "made"), "--light"]), entrants)
    assert capsys.readouterr().out == ""
    # As on another machine: the folder stands elsewhere, and no model can be loaded.
    (tmp_path / "made").rename(tmp_path / "carried")
    monkeypatch.delattr(module, "case_to_time")
    contest("try", arguments.parse_args(["--time", str(tmp_path / "carried"), "--batches", "2"]), entrants)
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {row["what"]: row for row in found["rows"]}
    assert found["left_out"] == {"tiny": {"not here": "pip install it"}}
    assert rows["float"]["eps SQNR dB"] == 200.0
    assert (rows["float"]["batch"], rows["five rows"]["batch"], rows["float"]["faster"]) == (2, 5, 1.0)
    assert rows["numbers only"]["kernels"] == 7
    assert "median ms" not in rows["numbers only"]


def test_the_first_is_always_wanted() -> None:
    found = {"base": 0, "ours INT8": 1, "ours FP32": 2, "theirs": 3}
    assert list(wanted(found, None)) == list(found)
    assert list(wanted(found, "ours I;theirs")) == ["base", "ours INT8", "theirs"]
