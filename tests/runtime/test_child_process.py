"""Frames, and real children that speak, fail, die, and end with their parent."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from qdm_deploy.child_process import Child, Frame, _receive_frames, error_of, frame, how_it_ended, read_frame
from qdm_deploy.errors import EngineError, QdmError

CHILD = "tests.runtime.talking_child"


def received(data: bytes) -> list[Frame]:
    """The frames of a stream that ends after ``data``."""
    ours, theirs = socket.socketpair()
    with theirs:
        with ours:
            ours.sendall(data)
        return list(_receive_frames(theirs))


def test_arrays_keep_their_bits_and_are_the_readers_own() -> None:
    values = np.array([[np.nan, -np.inf, 1e-45]], np.float32)
    data = frame("done", [values, values[:, ::2]], request_id="a")

    async def body() -> Frame:
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        reader.feed_eof()
        found = await read_frame(reader)
        with pytest.raises(EOFError):
            await read_frame(reader)
        return found

    for header, (first, second) in (asyncio.run(body()), *received(data)):
        assert header == {"kind": "done", "arrays": [["<f4", [1, 3]], ["<f4", [1, 2]]], "request_id": "a"}
        assert first.tobytes() == values.tobytes()
        np.testing.assert_array_equal(second, values[:, ::2])
        first[0, 0] = 0


@pytest.mark.parametrize("kept", [3, 10, -1])
def test_a_stream_that_ends_inside_a_frame_is_an_end(kept: int) -> None:
    whole = frame("first")
    assert received(whole + frame("done", [np.zeros(4, np.float32)])[:kept]) == [({"kind": "first", "arrays": []}, [])]


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (-signal.SIGKILL, "was killed (SIGKILL), usually because the system ran out of memory"),
        (-signal.SIGSEGV, "crashed with SIGSEGV"),
        (3, "ended with exit status 3"),
    ],
)
def test_how_a_process_ended(status: int, words: str) -> None:
    assert how_it_ended(status) == words


def test_a_conversation(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log, Child(CHILD, stderr=log) as child:
        child.tell("print", said="native code prints where it likes")
        child.tell("echo", said="ä")
        child.tell("fail", said="a reason")
        child.tell("leave")
        echo, failure = child.frames()
        assert child.wait() == 3
        child.tell("echo", said="nobody hears this")
    assert echo["said"] == "ä"
    # It imports what this process imports, and nothing from the folder that it was started in.
    assert set(echo["path"]) >= {os.path.abspath(folder) for folder in sys.path if os.path.exists(folder)}
    assert "" not in echo["path"]
    error = error_of(failure)
    assert (type(error), str(error)) == (EngineError, "a reason")
    assert type(error_of({"error": "OfAnotherVersion", "message": ""})) is QdmError
    assert (tmp_path / "log").read_text() == "native code prints where it likes\n"


def test_a_child_that_dies_inside_a_word() -> None:
    with Child(CHILD) as child:
        child.tell("die in a word")
        assert [header["said"] for header in child.frames()] == ["all of it"]
        assert child.wait() == -signal.SIGKILL


def test_the_end_of_the_context_is_the_end_of_a_child_that_works() -> None:
    with Child(CHILD) as child:
        child.tell("work")
        assert next(child.frames())["kind"] == "working"
    assert child.wait() == -signal.SIGKILL


@pytest.mark.parametrize("stopped", [False, True])
def test_a_child_ends_with_its_parent_inside_its_work_and_while_it_is_stopped(stopped: bool) -> None:
    program = (
        "import time\n"
        "from qdm_deploy.child_process import Child\n"
        f"child = Child({CHILD!r})\n"
        "child.tell('echo', said='')\n"
        "child.tell('work')\n"
        "frames = child.frames()\n"
        "print(next(frames)['pid'], next(frames)['kind'], flush=True)\n"
        "time.sleep(600)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline().split()[0])
        if stopped:
            os.kill(pid, signal.SIGSTOP)
        parent.kill()
    end = time.monotonic() + 20
    while Path(f"/proc/{pid}/stat").exists() and ") Z " not in Path(f"/proc/{pid}/stat").read_text():
        assert time.monotonic() < end
        time.sleep(0.01)
