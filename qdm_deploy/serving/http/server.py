"""Serve an engine until a signal: load, answer, drain, end.

The port is open from the start, so that probes get an answer while the engine loads; and it stays open while requests
drain, so that a balancer which has not noticed yet gets 503 with Retry-After and not a refused connection.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn

from qdm_deploy.errors import EnvironmentProblem
from qdm_deploy.serving.contract import Engine
from qdm_deploy.serving.http.app import create_app
from qdm_deploy.serving.http.logs import start_logging
from qdm_deploy.serving.http.protocol import protocol_class
from qdm_deploy.serving.http.settings import HttpSettings
from qdm_deploy.serving.http.translate import Makers

__all__ = ["run_server"]

_LOG = logging.getLogger("qdm_deploy.server")
_KEEP_ALIVE_SECONDS = 5
# For the last bytes of answers whose images are done.
_FLUSH_SECONDS = 5


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: they would close the port before requests have drained."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def run_server(
    engine: Engine,
    settings: HttpSettings,
    *,
    makers: Makers | None = None,
    on_listening: Callable[[str], None] | None = None,
    quiet: bool = False,
) -> int:
    """Serve until SIGTERM or SIGINT, and return the exit code.

    The first signal drains: no request is admitted any more, those that were get ``settings.drain_timeout`` seconds,
    then the process ends with 0. The second one ends it at once, with 128 + the signal's number.

    Args:
        engine: not started yet.
        settings: where to listen, limits and access.
        makers: of conditions and pictures, as ``create_app`` takes them.
        on_listening: called with the URL as soon as connections are taken; requests are admitted when the engine is up.
        quiet: log warnings and errors only.

    Raises:
        InputError: the model cannot be served over HTTP.
        EnvironmentProblem: the address cannot be listened on.
        QdmError: the engine could not be started.
    """
    app = create_app(engine, settings, makers)
    listener = _listen(settings)
    start_logging(quiet=quiet)
    config = uvicorn.Config(
        app,
        http=protocol_class(settings.body_timeout, settings.max_connections),
        loop="asyncio",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=_FLUSH_SECONDS,
    )
    port = listener.getsockname()[1]
    url = f"http://{f'[{settings.host}]' if ':' in settings.host else settings.host}:{port}"
    with listener:
        return asyncio.run(_Run(_Server(config), engine, settings).serve(listener, url, on_listening))


def _listen(settings: HttpSettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise EnvironmentProblem(
            f"{settings.host} port {settings.port} cannot be listened on ({error.strerror or error}); choose another "
            "with --host and --port"
        ) from error
    return listener


class _Run:
    """One life of the server."""

    def __init__(self, server: _Server, engine: Engine, settings: HttpSettings) -> None:
        self._server = server
        self._engine = engine
        self._settings = settings
        self._signals = 0
        self._stopping = asyncio.Event()
        self._failure: BaseException | None = None

    async def serve(self, listener: socket.socket, url: str, on_listening: Callable[[str], None] | None) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        serving = asyncio.ensure_future(self._server.serve(sockets=[listener]))
        life = asyncio.ensure_future(self._live(url, on_listening))
        try:
            await asyncio.wait({serving, life}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._server.should_exit = True
            self._stopping.set()
            await asyncio.gather(serving, life, return_exceptions=True)
            await self._engine.close()
        for task in (life, serving):
            if (error := task.exception()) is not None:
                raise error
        _LOG.info("ended")
        return 0

    async def _live(self, url: str, on_listening: Callable[[str], None] | None) -> None:
        """From loading to drained."""
        while not self._server.started and not self._server.should_exit:
            await asyncio.sleep(0.01)
        _LOG.info("listening", extra={"url": url, "model": self._engine.model.name})
        if on_listening is not None:
            on_listening(url)
        starting = asyncio.ensure_future(self._engine.start())
        stopping = asyncio.ensure_future(self._stopping.wait())
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            _LOG.info("stopped while loading")
            return
        try:
            starting.result()
        finally:
            stopping.cancel()
        _LOG.info("ready", extra={"backend": self._engine.state.backend})
        await self._stopping.wait()
        state = self._engine.state
        _LOG.info("draining", extra={"running": len(state.running), "waiting": state.waiting})
        await self._engine.drain(self._settings.drain_timeout)

    def _on_signal(self, number: int) -> None:
        self._signals += 1
        if self._signals == 1:
            _LOG.info("signal", extra={"signal": signal.Signals(number).name})
            self._stopping.set()
            return
        _LOG.warning("second signal: ending at once", extra={"signal": signal.Signals(number).name})
        # Nothing is cleaned up on the way: that is what it asks for. The engine process ends with its pipe.
        logging.shutdown()
        os._exit(128 + number)
