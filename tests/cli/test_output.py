import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from qdm_deploy.cli.output import Output, document_text, plain
from qdm_deploy.cli.tables import db, print_engines, print_table, size, span
from qdm_deploy.report.model import CheckRow, EngineRow


@dataclass(frozen=True)
class Value:
    path: Path
    rows: tuple[CheckRow, ...]


def printed(show: Callable[[Console], None]) -> str:
    stream = io.StringIO()
    output = Output("test", stream, io.StringIO())
    output.result({}, show, [])
    return stream.getvalue()


def test_values_become_json() -> None:
    value = Value(Path("a/b"), (CheckRow(name="x", ok=True, detail="1 of 1"),))
    document = {
        "value": value,
        "array": np.array([[1, 2]], dtype=np.int64),
        "scalar": np.float32(0.5),
        "missing": [None, float("nan"), -float("inf"), np.float64("nan")],
        3: True,
    }
    assert plain(document) == {
        "value": {"path": "a/b", "rows": [{"name": "x", "ok": True, "detail": "1 of 1"}]},
        "array": [[1, 2]],
        "scalar": 0.5,
        "missing": [None, None, None, None],
        "3": True,
    }


def test_a_value_without_json_form_is_refused() -> None:
    with pytest.raises(TypeError, match="a set has no JSON form"):
        plain({"a": {1, 2}})


def test_a_document_is_one_line_with_version_and_command() -> None:
    text = document_text("build", {"label": "T-Shirt ×\n"})
    assert text == '{"schema_version": "1.0", "command": "build", "label": "T-Shirt ×\\n"}\n'
    assert json.loads(text)["label"] == "T-Shirt ×\n"


@pytest.mark.parametrize(
    ("switches", "expected"),
    [
        ({}, "for people\n"),
        ({"quiet": True}, "short\n7\n"),
        ({"json": True}, '{"schema_version": "1.0", "command": "test", "a": 1}\n'),
        ({"json": True, "quiet": True}, '{"schema_version": "1.0", "command": "test", "a": 1}\n'),
    ],
)
def test_a_result_in_its_three_forms(switches: dict[str, bool], expected: str) -> None:
    results, messages = io.StringIO(), io.StringIO()
    output = Output("test", results, messages, **switches)
    output.progress.say("working")
    output.result({"a": 1}, lambda console: console.print("for people"), ["short", 7])
    assert results.getvalue() == expected
    assert messages.getvalue() == ("" if switches.get("quiet") else "working\n")


def test_the_command_line_can_be_pasted() -> None:
    output = Output("build", io.StringIO(), io.StringIO(), arguments=("build", "--out", "my model.qdm"))
    assert output.command_line == "qdm-deploy build --out 'my model.qdm'"


def test_text_is_printed_as_it_is() -> None:
    assert printed(lambda console: console.print("[bold]x[/bold] :smile: [1, 2] " + "y" * 500)) == (
        "[bold]x[/bold] :smile: [1, 2] " + "y" * 500 + "\n"
    )


def test_a_table_in_a_file_has_one_line_per_row() -> None:
    reason = "stays in floating point because " + "of its range " * 15
    rows = [("down.0", "1", reason), ("a.very.long.module.path", "-12", "[b]")]
    text = printed(lambda console: print_table(console, "layers", ("layer", ">z", "reason"), rows))
    lines = [line.rstrip() for line in text.splitlines()]
    assert lines[:3] == ["", "layers", "layer                      z  reason"]
    assert lines[3:] == [f"down.0                     1  {reason}".rstrip(), "a.very.long.module.path  -12  [b]"]
    assert printed(lambda console: print_table(console, "nothing", ("a",), [])) == ""


def test_colours_follow_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    def shown() -> str:
        stream = Terminal()
        Output("test", stream, io.StringIO()).result({}, lambda console: console.print("x", style="green"), [])
        return stream.getvalue()

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert shown() == "\x1b[32mx\x1b[0m\n"
    monkeypatch.setenv("NO_COLOR", "1")
    assert shown() == "x\n"


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_940, "999.9 kB"),
        (999_960, "1.0 MB"),
        (35_123_456, "35.1 MB"),
        (2_000_000_000, "2.0 GB"),
        (5 * 10**15, "5000.0 TB"),
    ],
)
def test_size(count: int, said: str) -> None:
    assert size(count) == said


def test_decibels_and_spans() -> None:
    assert [db(None), db(0.0), db(31.26)] == ["-", "0.0 dB", "31.3 dB"]
    assert [span(None), span((0.25, 4.0)), span((1.5, 1.5001))] == ["-", "0.25-4", "1.5"]


def test_an_engine_shows_what_is_not_int8() -> None:
    facts: dict[str, Any] = {"backend": "tensorrt-rtx", "planned": 9, "build_seconds": 61.04}
    good = EngineRow(**facts, sm="8.9", int8=9, kernels={"convolution": 9, "cast": 0})
    bad = EngineRow(**facts, sm="12.0", int8=8, kernels={"convolution": 9}, failures=("conv_in: runs in Half",))
    text = printed(lambda console: print_engines(console, iter([good, bad])))
    assert [" ".join(line.split()) for line in text.splitlines()[3:5]] == [
        "tensorrt-rtx 8.9 9 of 9 61.0 s",
        "tensorrt-rtx 12.0 8 of 9 61.0 s",
    ]
    assert text.endswith("  not INT8 on SM 12.0: conv_in: runs in Half\n")
