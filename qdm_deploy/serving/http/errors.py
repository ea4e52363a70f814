"""Every error as the OpenAI API words it: ``{"error": {"message", "type", "param", "code"}}``, whatever the status."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from starlette.responses import JSONResponse

from qdm_deploy.serving.contract import AdmissionRefused, GenerationFailed

__all__ = [
    "ApiError",
    "ErrorDocument",
    "error_response",
    "of_bug",
    "of_failure",
    "of_refusal",
    "of_status",
    "of_validation",
]

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
_CODES = {404: "not_found", 405: "method_not_allowed", 408: "request_timeout", 413: "request_too_large"}
_RETRY_SECONDS = 2.0


class ErrorBody(BaseModel):
    """What went wrong."""

    model_config = ConfigDict(extra="forbid")

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorDocument(BaseModel):
    """The body of every answer that is not a success."""

    model_config = ConfigDict(extra="forbid")

    error: ErrorBody


class ApiError(Exception):
    """An answer other than success.

    Args:
        status: of HTTP.
        message: what was given, what is allowed, what to do.
        code: stable, for programs.
        param: the field that is to blame.
        retry: whether the same request may work later: sent as ``x-should-retry``; None leaves it to the client.
        retry_after: seconds until then.
        headers: further headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry: bool | None = None,
        retry_after: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code if code is not None else _CODES.get(status)
        self.param = param
        self.headers = dict(headers or {})
        if retry is not None:
            self.headers["x-should-retry"] = "true" if retry else "false"
        if retry_after is not None:
            self.headers["retry-after"] = str(max(1, math.ceil(retry_after)))

    @property
    def document(self) -> dict[str, object]:
        """The body."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def error_response(error: ApiError) -> JSONResponse:
    """The answer to an ``ApiError``."""
    return JSONResponse(error.document, error.status, error.headers)


def of_bug(request_id: str) -> ApiError:
    """What nobody foresaw: details are in the log only."""
    return ApiError(500, f"internal error; the log has more under {request_id}", code="internal", retry=False)


def of_refusal(refusal: AdmissionRefused, queue_full_status: Literal[429, 503]) -> ApiError:
    """A request that was not admitted: 503, or what the operator chose for a full queue."""
    status = queue_full_status if refusal.reason == "queue_full" else 503
    return ApiError(status, str(refusal), code=refusal.reason, retry=True, retry_after=refusal.retry_after)


def of_failure(failure: GenerationFailed) -> ApiError:
    """A request that was admitted and ended without images.

    The engine's death is worth another try, elsewhere or here; what the request itself causes is not: the OpenAI client
    would run it three times.
    """
    if failure.reason == "deadline":
        return ApiError(504, str(failure), code="deadline_exceeded", retry=False)
    if failure.reason == "not_finite":
        return ApiError(500, str(failure), code="not_finite", retry=False)
    if failure.reason == "shutdown":
        return ApiError(503, str(failure), code="shutting_down", retry=True, retry_after=_RETRY_SECONDS)
    if failure.reason == "cancelled":
        return ApiError(499, str(failure), code="cancelled")
    return ApiError(500, str(failure), code="engine_error", retry=True, retry_after=_RETRY_SECONDS)


def of_status(status: int, detail: object, headers: Mapping[str, str] | None = None) -> ApiError:
    """What the router or the body reader refused."""
    messages = {
        404: "there is nothing at this path; see /openapi.json",
        405: "this path does not take this method; see the Allow header and /openapi.json",
    }
    retry = False if status >= 500 else None
    return ApiError(status, messages.get(status, str(detail)), headers=headers, retry=retry)


def of_validation(problems: Sequence[Mapping[str, Any]]) -> ApiError:
    """A body that does not fit the schema: the first problem, in words; values are not repeated."""
    first = problems[0]
    place = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    kind = first["type"]
    if kind == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first['ctx']['error']}", code="invalid_json")
    if not place:
        return ApiError(400, "the body must be a JSON object, sent with Content-Type: application/json")
    # A name may hold half a surrogate pair, which no answer could carry.
    field = place[0][:100].encode("ascii", "backslashreplace").decode()
    if kind == "extra_forbidden":
        message = f"unknown field '{field}'; the fields are listed in /openapi.json"
    else:
        # Of a field with several types, one problem for each.
        said = dict.fromkeys(problem["msg"] for problem in problems if problem["loc"][:2] == first["loc"][:2])
        message = f"'{field}' cannot be used: {'; or '.join(said)}"
    return ApiError(400, message, param=field, code="unknown_field" if kind == "extra_forbidden" else "invalid_value")
