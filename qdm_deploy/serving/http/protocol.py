"""uvicorn's HTTP/1.1 protocol with the limits that it leaves to a proxy.

They are slow headers, readers that take nothing of their answer, and the number of connections.
"""

import asyncio
import json

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from qdm_deploy.serving.http.errors import ApiError

__all__ = ["protocol_class"]

_LINGER_SECONDS = 1.0


def protocol_class(header_timeout: float, max_connections: int) -> type[H11Protocol]:
    """A protocol class with limits.

    Args:
        header_timeout: seconds within which a header must be whole, counted from the connection, or from the first
            byte after an earlier answer.
        max_connections: connections open at once; one more gets 503.
    """
    return type(
        "LimitedProtocol", (_LimitedProtocol,), {"header_timeout": header_timeout, "max_connections": max_connections}
    )


class _LimitedProtocol(H11Protocol):
    header_timeout: float
    max_connections: int
    reader_timeout = 30.0
    """Seconds without a byte taken after which a connection with an unsent answer is dropped."""
    _reader_timer: asyncio.TimerHandle | None = None
    _unsent = 0
    _timer: asyncio.TimerHandle | None = None
    _refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            error = ApiError(
                503, "too many connections are open", code="too_many_connections", retry=True, retry_after=1
            )
            self._refuse(error)
        else:
            self._await_header()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._stop_reader_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused or self.transport.is_closing():
            return
        if self._idle() and self._timer is None:
            self._await_header()
        super().data_received(data)
        if not self._idle():
            self._stop_timer()
            if not self.flow.write_paused:
                self._stop_reader_timer()  # the next answer is on its way, so what is unsent may grow

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_reader_timer()

    def on_response_complete(self) -> None:
        # Even a connection that is being closed stays, with all that is unsent, until its reader has taken it.
        if self._reader_timer is None and self.transport.get_write_buffer_size():
            self._watch_reader()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, "this is not HTTP/1.1, or its header is too long", code="invalid_http"))

    def _idle(self) -> bool:
        """No request's header has arrived since the last answer."""
        return self.cycle is None or self.cycle.response_complete

    def _await_header(self) -> None:
        self._timer = self.loop.call_later(self.header_timeout, self._too_slow)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _watch_reader(self) -> None:
        """Look again after a while; nothing is added to what is unsent until then."""
        self._stop_reader_timer()
        self._unsent = self.transport.get_write_buffer_size()
        self._reader_timer = self.loop.call_later(self.reader_timeout, self._check_reader)

    def _check_reader(self) -> None:
        left, before = self.transport.get_write_buffer_size(), self._unsent
        if left and left >= before:
            self.transport.abort()
        elif left:
            self._watch_reader()
        else:
            self._reader_timer = None

    def _stop_reader_timer(self) -> None:
        if self._reader_timer is not None:
            self._reader_timer.cancel()
            self._reader_timer = None

    def _too_slow(self) -> None:
        if self._idle() and not self.transport.is_closing():
            self._refuse(ApiError(408, f"the header did not arrive within {self.header_timeout:g} s"))

    def _refuse(self, error: ApiError) -> None:
        """Answer without a request; the connection ends with it."""
        self._stop_timer()
        self._refused = True
        body = json.dumps(error.document).encode()
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            "connection": "close",
            **error.headers,
        }
        try:
            parts = [
                self.conn.send(h11.Response(status_code=error.status, headers=list(headers.items()))),
                self.conn.send(h11.Data(data=body)),
                self.conn.send(h11.EndOfMessage()),
            ]
        except h11.LocalProtocolError:
            parts = []  # an answer is on its way already
        self.transport.write(b"".join(part for part in parts if part))
        # Closed at once, a connection with unread data is reset, and the answer may be lost with it.
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(_LINGER_SECONDS, self.transport.close)
