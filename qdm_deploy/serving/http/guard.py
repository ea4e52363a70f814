"""What happens to every request before and after its route: identity, access, limits, headers, one line of log.

Plain ASGI rather than Starlette's middleware with a response object: the body must be watched while it is read, and a
client that leaves must be seen by the route.
"""

import asyncio
import logging
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qdm_deploy.serving.http.errors import ApiError, error_response, of_bug, of_status
from qdm_deploy.serving.http.metrics import Metrics
from qdm_deploy.serving.http.settings import HttpSettings, is_loopback

__all__ = ["Guard"]

_LOG = logging.getLogger("qdm_deploy.http")
# Probes have no key, and the page asks for one; neither shows anything about requests or the model.
_OPEN = frozenset({"/health", "/health/live", "/health/ready", "/v2/health/live", "/v2/health/ready"})
_PAGE = frozenset({"/", "/page/app.js", "/page/style.css", "/page/batch.js", "/favicon.ico"})
_LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})
_LINGER_BYTES, _LINGER_SECONDS = 8 << 20, 2.0
_API_POLICY = "default-src 'none'; frame-ancestors 'none'"
_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Guard:
    """ASGI middleware around the whole application.

    Args:
        app: the application.
        settings: access and limits.
        metrics: counts the answers.
    """

    def __init__(self, app: ASGIApp, settings: HttpSettings, metrics: Metrics) -> None:
        self._app = app
        self._settings = settings
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif scope["type"] != "http":
            await self._app(scope, receive, send)
        else:
            await _Exchange(self._app, self._settings, self._metrics, scope, receive, send).run()


class _Exchange:
    """One request and its answer."""

    def __init__(
        self, app: ASGIApp, settings: HttpSettings, metrics: Metrics, scope: Scope, receive: Receive, send: Send
    ) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics
        self._scope, self._receive, self._send = scope, receive, send
        self._headers = Headers(scope=scope)
        self._id = f"req_{uuid.uuid4().hex}"
        self._status = 0
        self._begun = time.perf_counter()
        self._body_read = "content-length" not in self._headers and "transfer-encoding" not in self._headers
        self._body_deadline = self._begun + settings.body_timeout
        self._body_bytes = 0
        self._lingering = False

    async def run(self) -> None:
        self._scope.setdefault("state", {})["request_id"] = self._id
        try:
            refusal = self._refusal()
            if refusal is not None:
                await error_response(refusal)(self._scope, self._receive_body, self._send_head)
            else:
                await self._app(self._scope, self._receive_body, self._send_head)
        except Exception:
            _LOG.exception("request failed", extra={"request_id": self._id})
            if self._status:
                raise  # the answer has begun; only closing the connection can say that it is not whole
            await error_response(of_bug(self._id))(self._scope, self._receive_body, self._send_head)
        finally:
            self._log()

    def _refusal(self) -> ApiError | None:
        path = self._scope["path"]
        if self._headers.get("content-encoding", "identity").lower() != "identity":
            return ApiError(415, "the body is compressed; send it as it is", code="unsupported_encoding")
        length = self._headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self._settings.max_body_bytes:
            return self._too_large()
        if path in _OPEN or path in _PAGE:
            return self._host_refusal() if path in _PAGE else None
        if self._settings.api_key is None:
            return self._host_refusal()
        kind, _, key = self._headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and self._settings.is_key(key.strip()):
            return None
        what = "is wrong" if key else "is missing"
        return ApiError(
            401,
            f"the API key {what}; send it as Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )

    def _too_large(self) -> ApiError:
        return of_status(413, f"the body is too large; allowed are {self._settings.max_body_bytes} bytes")

    def _host_refusal(self) -> ApiError | None:
        """Without a key, a page of another site must not reach a local server through a name that it controls."""
        settings = self._settings
        if settings.api_key is not None or not is_loopback(settings.host):
            return None
        given = self._headers.get("host", "")
        host = given.partition("]")[0].removeprefix("[") if given.startswith("[") else given.partition(":")[0]
        allowed = {name.lower() for name in (settings.host, *settings.allowed_hosts)}
        if host.lower() in _LOCAL | allowed or is_loopback(host):
            return None
        return ApiError(
            403, f"the Host header {given[:100]!a} is not this machine; allow it with --allowed-host", code="wrong_host"
        )

    async def _receive_body(self) -> Message:
        if self._body_read:
            return await self._receive()
        left = self._body_deadline - time.perf_counter()
        try:
            message = await asyncio.wait_for(self._receive(), max(left, 0.001))
        except TimeoutError as error:
            raise HTTPException(
                408, f"the body did not arrive within {self._settings.body_timeout:g} s; send it again"
            ) from error
        self._body_read = message["type"] == "http.disconnect" or not message.get("more_body", False)
        self._body_bytes += len(message.get("body", b""))
        # Starlette's own limit would answer in plain text, past the error handlers.
        if self._body_bytes > self._settings.max_body_bytes and not self._lingering:
            raise HTTPException(413, str(self._too_large()))
        return message

    async def _send_head(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            if not self._body_read:
                # What is still on its way would otherwise be read as the next request, or for ever.
                headers["connection"] = "close"
                await self._linger()
            self._status = message["status"]
            self._add_headers(headers)
        await self._send(message)

    async def _linger(self) -> None:
        """Take a bounded rest of the body: a connection closed on unread data loses the answer on its way."""
        if self._headers.get("expect") or self._status == 408:
            return
        self._lingering = True
        self._body_deadline = min(self._body_deadline, time.perf_counter() + _LINGER_SECONDS)
        try:
            while not self._body_read and self._body_bytes < _LINGER_BYTES:
                await self._receive_body()
        except HTTPException:
            return

    def _add_headers(self, headers: MutableHeaders) -> None:
        headers["x-request-id"] = self._id
        headers["x-content-type-options"] = "nosniff"
        headers["referrer-policy"] = "no-referrer"
        headers["x-frame-options"] = "DENY"
        headers["cross-origin-resource-policy"] = "same-origin"
        headers["content-security-policy"] = _PAGE_POLICY if self._scope["path"] in _PAGE else _API_POLICY
        headers.setdefault("cache-control", "no-store")

    def _log(self) -> None:
        # Neither the query nor the body: prompts and keys do not belong into logs.
        status = self._status or 499
        self._metrics.answered(status)
        quiet = self._scope["path"] in _OPEN or self._scope["path"] in ("/metrics", "/v1/engine")
        client = self._scope.get("client")
        _LOG.log(
            logging.DEBUG if quiet and status < 400 else logging.INFO,
            "request",
            extra={
                "request_id": self._id,
                "generation_id": self._scope["state"].get("generation_id"),
                "client": client[0] if client else None,
                "method": self._scope["method"],
                "path": self._scope["path"][:200],
                "status": status,
                "seconds": round(time.perf_counter() - self._begun, 4),
            },
        )
