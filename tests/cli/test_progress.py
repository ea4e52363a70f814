import io
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from qdm_deploy.cli.progress import BarProgress, LineProgress, duration, progress_on


@contextmanager
def terminal() -> Iterator[tuple[io.TextIOWrapper, Callable[[], str]]]:
    """A stream that is a terminal, and what has been shown on it."""
    master, slave = os.openpty()
    shown: list[bytes] = []

    def read() -> None:
        while True:
            try:
                data = os.read(master, 65536)
            except OSError:  # what Linux reports when the last writer has closed
                return
            shown.append(data)

    reader = threading.Thread(target=read)
    reader.start()
    stream = os.fdopen(slave, "w", encoding="utf-8")

    def everything() -> str:
        stream.close()
        reader.join()
        return b"".join(shown).decode()

    yield stream, everything
    everything()
    os.close(master)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (200, "3 min 20 s"),
        (3599.9, "1 h 0 min"),
        (7512, "2 h 5 min"),
    ],
)
def test_duration(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_lines_for_a_log() -> None:
    log = io.StringIO()
    progress = LineProgress(log)
    with progress.task("calibration", 3) as advance:
        advance()
        advance(2)
        progress.say("half way")
    lines = log.getvalue().splitlines()
    assert lines[:2] == ["calibration ...", "half way"]
    assert re.fullmatch(r"calibration: done in 0\.\d s", lines[2])
    assert len(lines) == 3


def test_a_long_task_reports_in_between_even_when_it_counts_nothing() -> None:
    log = io.StringIO()
    progress = LineProgress(log, interval_s=0.02)
    with progress.task("engine", None):
        while "so far" not in log.getvalue():
            time.sleep(0.005)
    with progress.task("calibration", 8) as advance:
        advance(2)
        while "2/8" not in log.getvalue():
            time.sleep(0.005)
    text = log.getvalue()
    assert re.search(r"^engine: \d+\.\d s so far$", text, re.MULTILINE)
    assert re.search(r"^calibration: 2/8, [0-9.]+/s, \d+\.\d s so far, about \d+\.\d s left$", text, re.MULTILINE)
    after = len(log.getvalue())
    time.sleep(0.05)
    assert len(log.getvalue()) == after


def test_a_task_that_fails_is_not_reported_as_done() -> None:
    log, before = io.StringIO(), set(threading.enumerate())
    with pytest.raises(KeyError), LineProgress(log).task("calibration", 3):
        raise KeyError
    assert log.getvalue() == "calibration ...\n"
    assert set(threading.enumerate()) <= before


def test_bars_in_a_terminal_leave_one_line_per_task() -> None:
    with terminal() as (stream, shown):
        progress = progress_on(stream)
        assert isinstance(progress, BarProgress)
        with progress.task("calibration [16]", 4) as advance:
            advance(3)
            progress.say("a message")
            with progress.task("inner", None):
                pass
        with pytest.raises(KeyError), progress.task("second", 2):
            raise KeyError
        text = shown()
    assert "3/4" in text
    assert re.search(r"\d/s", text)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n")
    lines = [line.strip() for line in plain.split("\n") if line.strip()]
    finished = [line for line in lines if "done in" in line]
    assert [line.partition(":")[0] for line in finished] == ["inner", "calibration [16]"]
    assert "a message" in lines
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") > 0, "the cursor must be shown again"


def test_no_bars_where_they_cannot_be_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(progress_on(io.StringIO()), LineProgress)
    monkeypatch.setenv("TERM", "dumb")
    with terminal() as (stream, _):
        assert isinstance(progress_on(stream), LineProgress)
