"""A child process with a conversation: started clean, spoken to over a socket pair, never left behind.

The server's worker, the workers of a batch job and the builder of an engine are such children. Each side holds one end
of a socket pair, and what travels is a frame: two little-endian uint32 lengths, a header as UTF-8 JSON, then arrays one
after the other, C order; the header's ``arrays`` holds their types and shapes. No pickle: reading one runs code, and
requests carry what users sent, so the standard library's multiprocessing, which pickles whatever it moves, is not used.
A socket pair rather than shared memory: frames are small beside the work, nothing is left behind when a process is
killed, and the end of one process is the end of the stream for the other.
"""

import ctypes
import json
import math
import os
import queue
import signal
import socket
import struct
import subprocess
import sys
import threading
from asyncio import StreamReader
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, cast

import numpy as np
from numpy.typing import NDArray

from qdm_deploy import errors
from qdm_deploy.errors import QdmError

__all__ = ["Child", "Frame", "Parent", "child_command", "error_of", "frame", "how_it_ended", "read_frame"]

Frame = tuple[dict[str, Any], list[NDArray[Any]]]

_LENGTHS = struct.Struct("<II")
_TYPES = {"float32": "<f4", "int64": "<i8"}
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


# ---------------------------------------------------------------------------------------------------------- frames


def frame(kind: str, arrays: Sequence[NDArray[Any]] = (), **fields: object) -> bytes:
    """One frame; ``fields`` are JSON values."""
    described = [(_TYPES[array.dtype.name], array.shape) for array in arrays]
    header = json.dumps({"kind": kind, "arrays": described, **fields}).encode()
    payload = b"".join(
        np.ascontiguousarray(array, code).tobytes() for array, (code, _) in zip(arrays, described, strict=True)
    )
    return _LENGTHS.pack(len(header), len(payload)) + header + payload


async def read_frame(stream: StreamReader) -> Frame:
    """Wait for a frame.

    Raises:
        EOFError: the stream ended, between two frames or inside one.
    """
    header_size, payload_size = _LENGTHS.unpack(await stream.readexactly(_LENGTHS.size))
    return _parse(await stream.readexactly(header_size), await stream.readexactly(payload_size))


def error_of(header: dict[str, Any]) -> QdmError:
    """The error that a child told of with ``Parent.tell_error``."""
    kind = getattr(errors, header["error"], QdmError)
    return cast(QdmError, kind(header["message"]))


def _receive_frames(stream: socket.socket) -> Iterator[Frame]:
    """The frames of a blocking socket until its end, which may come inside one."""
    with suppress(EOFError, OSError):
        while True:
            header_size, payload_size = _LENGTHS.unpack(_receive(stream, _LENGTHS.size))
            yield _parse(_receive(stream, header_size), _receive(stream, payload_size))


def _receive(stream: socket.socket, size: int) -> bytes:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = stream.recv_into(view)
        if count == 0:
            raise EOFError
        view = view[count:]
    return bytes(data)


def _parse(header: bytes, payload: bytes) -> Frame:
    fields = json.loads(header)
    arrays = []
    offset = 0
    for code, shape in fields["arrays"]:
        array = np.frombuffer(payload, code, math.prod(shape), offset).reshape(shape)
        offset += array.nbytes
        arrays.append(array.astype(array.dtype.newbyteorder("=")))  # the caller's own: the payload cannot be written to
    return fields, arrays


# ------------------------------------------------------------------------------------------------------ the parent


def child_command(program: Sequence[str], theirs: socket.socket) -> tuple[list[str], dict[str, Any]]:
    """The command line of a child, and the keywords that ``subprocess.Popen`` or its asyncio twin starts it with.

    Args:
        program: arguments of the interpreter; the number of the child's socket follows them.
        theirs: the child's end; close it here once the child runs, or the child's end would not end the stream.
    """
    # The child imports what this process imports, from wherever this process does; -P keeps the current folder out.
    folders = [os.path.abspath(folder) for folder in sys.path]
    return [sys.executable, "-P", *program, str(theirs.fileno())], {
        "stdin": subprocess.DEVNULL,
        "pass_fds": [theirs.fileno()],
        "env": {**os.environ, "PYTHONPATH": os.pathsep.join(folders)},
        # Ctrl-C in a terminal reaches this process alone, which tells its children what they need to know.
        "start_new_session": True,
    }


def how_it_ended(status: int) -> str:
    """An exit status in words, to stand behind the name of the process."""
    if status == -signal.SIGKILL:
        return "was killed (SIGKILL), usually because the system ran out of memory"
    if status < 0:
        return f"crashed with {signal.Signals(-status).name}"
    return f"ended with exit status {status}"


class Child:
    """A running child, for a parent that waits for it; as a context it is killed at the end.

    Args:
        module: what it runs; ``Parent`` is its side.
        stderr: where its output goes, both streams of it; None is the parent's standard error.

    Raises:
        OSError: no process can be started.
    """

    def __init__(self, module: str, *, stderr: IO[bytes] | None = None) -> None:
        self._stream, theirs = socket.socketpair()
        with theirs:
            command, options = child_command(("-m", module), theirs)
            try:
                self._process = subprocess.Popen(command, stderr=stderr, **options)
            except BaseException:
                self._stream.close()
                raise

    def tell(self, kind: str, **fields: object) -> None:
        """Send a frame; one that nobody is there to read is dropped, and ``wait`` says why."""
        with suppress(ConnectionError):
            self._stream.sendall(frame(kind, (), **fields))

    def frames(self) -> Iterator[dict[str, Any]]:
        """Headers of the frames that it sends, until it is gone."""
        return (header for header, _ in _receive_frames(self._stream))

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; the exit status, negative for a signal.

        Raises:
            subprocess.TimeoutExpired: it still runs.
        """
        return self._process.wait(timeout)

    def send_signal(self, number: int) -> None:
        """Send a signal, if it still runs."""
        self._process.send_signal(number)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        self._stream.close()


# ------------------------------------------------------------------------------------------------------- the child


class Parent:
    """The parent, seen from the child, which does not outlive it: not inside a step, and not while it is stopped.

    Args:
        descriptor: the number of the child's socket, the last argument of its command line.
    """

    def __init__(self, descriptor: str) -> None:
        self._stream = socket.socket(fileno=int(descriptor))
        self._stream.set_inheritable(False)
        self._inbox: queue.SimpleQueue[Frame] = queue.SimpleQueue()
        with suppress(OSError):
            os.dup2(2, 1)  # native code prints where it likes, and standard output may hold the parent's results
        # Where memory runs out, the system should end this process, and not the one that can tell of it.
        with suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("500")
        # A process that is stopped (SIGSTOP) cannot see its stream end, so the kernel is asked to kill it.
        if sys.platform == "linux":
            with suppress(AttributeError, OSError):
                ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        threading.Thread(target=self._listen, daemon=True).start()

    @property
    def has_spoken(self) -> bool:
        """Whether ``receive`` would return at once."""
        return not self._inbox.empty()

    def receive(self) -> Frame:
        """The next frame; waits for it."""
        return self._inbox.get()

    def tell(self, kind: str, arrays: Sequence[NDArray[Any]] = (), **fields: object) -> None:
        """Send a frame."""
        self.send(frame(kind, arrays, **fields))

    def tell_error(self, error: QdmError) -> None:
        """Send an error, as ``error_of`` reads it, in a frame of the kind "error"."""
        self.tell("error", error=type(error).__name__, message=str(error))

    def send(self, frames: bytes) -> None:
        """Send frames that were made before."""
        try:
            self._stream.sendall(frames)
        except ConnectionError:
            os._exit(1)

    def _listen(self) -> None:
        for received in _receive_frames(self._stream):
            self._inbox.put(received)
        os._exit(1)
