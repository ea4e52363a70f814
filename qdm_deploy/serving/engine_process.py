"""The engine's process, seen from its parent: start, talk, kill, and say how it ended."""

import asyncio
import logging
import socket
from collections.abc import Sequence
from contextlib import suppress
from typing import Self

from qdm_deploy.child_process import Frame, child_command, frame, how_it_ended, read_frame
from qdm_deploy.serving.settings import EXIT_BROKEN, EXIT_OUT_OF_MEMORY, Settings

__all__ = ["CHILD", "EngineProcess"]

_LOG = logging.getLogger(__name__)
# One that hangs in a driver dies only when the driver lets it.
_LONGEST_DEATH = 10.0
CHILD = ("-m", "qdm_deploy.serving.child")


class EngineProcess:
    """A running child with a stream of frames in both directions. Made by ``start``."""

    def __init__(
        self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer
        self.pid = process.pid

    @classmethod
    async def start(cls, settings: Settings, program: Sequence[str] = CHILD) -> Self:
        """Start the process and hand it its settings.

        Args:
            settings: its first frame.
            program: arguments of the interpreter; the number of the child's socket follows them.

        Raises:
            OSError: no process can be started.
        """
        ours, theirs = socket.socketpair()
        command, options = child_command(program, theirs)
        try:
            process = await asyncio.create_subprocess_exec(*command, **options)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        try:
            ours.setblocking(False)
            reader, writer = await asyncio.open_unix_connection(sock=ours)
        except BaseException:
            ours.close()
            process.kill()
            raise
        opened = cls(process, reader, writer)
        opened.write(frame("open", settings=settings.to_json()))
        return opened

    async def read(self) -> Frame:
        """Wait for a frame.

        Raises:
            EOFError: the process is gone.
        """
        try:
            return await read_frame(self._reader)
        except ConnectionError as error:
            raise EOFError(str(error)) from error

    def write(self, data: bytes) -> None:
        """Send a frame, without waiting: the child takes frames in a thread of its own, even inside a step."""
        self._writer.write(data)

    def kill(self) -> None:
        """End the process at once, whatever it does; ``read`` raises from here on, even if it takes long to die."""
        with suppress(ProcessLookupError):
            self._process.kill()
        self._writer.transport.abort()

    async def end(self) -> None:
        """Kill it if it lives, and close the stream; what has not been sent is dropped."""
        self.kill()
        with suppress(OSError):
            await self._writer.wait_closed()
        try:
            async with asyncio.timeout(_LONGEST_DEATH):
                await self._process.wait()
        except TimeoutError:
            _LOG.error("the engine process %d was killed and is still there after %g s", self.pid, _LONGEST_DEATH)

    async def how_it_ended(self) -> str:
        """What to tell of a process whose stream has ended."""
        try:
            async with asyncio.timeout(5):
                status = await self._process.wait()
        except TimeoutError:
            return "the engine process closed its stream"
        if status == EXIT_OUT_OF_MEMORY:
            return "the engine process ran out of memory"
        if status == EXIT_BROKEN:
            return "the engine's session failed whatever it was given"
        return f"the engine process {how_it_ended(status)}"
