"""The application: routes, errors and the guard around them, on an engine that somebody else starts and stops."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from qdm_deploy.artifacts.record import installed_version
from qdm_deploy.components.encoders import open_encoder
from qdm_deploy.serving.contract import Engine
from qdm_deploy.serving.http.errors import ApiError, ErrorDocument, error_response, of_status, of_validation
from qdm_deploy.serving.http.guard import Guard
from qdm_deploy.serving.http.images import images_router
from qdm_deploy.serving.http.metadata import health_router, metadata_router
from qdm_deploy.serving.http.metrics import Metrics
from qdm_deploy.serving.http.page_route import page_router
from qdm_deploy.serving.http.service import Service
from qdm_deploy.serving.http.settings import HttpSettings, check_servable
from qdm_deploy.serving.http.translate import Makers

__all__ = ["create_app"]

# Statuses that the guard or the body reader may answer on any route.
_COMMON = (400, 401, 403, 408, 413, 415)


def create_app(engine: Engine, settings: HttpSettings, makers: Makers | None = None) -> FastAPI:
    """The HTTP side of an engine.

    Args:
        engine: started by the caller, before or after; until it is ready, requests get 503.
        settings: limits and access.
        makers: of conditions and pictures; None serves models of pixels that take no prompts.

    Raises:
        InputError: the HTTP side cannot make pictures of this model.
    """
    check_servable(engine.model)
    metrics = Metrics(engine, settings.bundle_id)
    service = Service(engine, settings, metrics, makers or Makers(open_encoder(engine.model)))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    common: dict[int | str, dict[str, Any]] = {status: {"model": ErrorDocument} for status in _COMMON}
    app = FastAPI(
        title="qdm-deploy",
        summary=f"Images of {engine.model.name}",
        version=installed_version() or "unknown",
        docs_url=None,  # FastAPI's own pages load scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
        redirect_slashes=False,
        responses=common,
    )
    app.include_router(images_router(service))
    app.include_router(metadata_router(service))
    app.include_router(health_router(service))
    app.include_router(page_router())
    _answer_errors(app)
    app.add_middleware(Guard, settings=settings, metrics=metrics)
    app.openapi = lambda: _openapi(app, settings)  # type: ignore[method-assign]
    return app


def _answer_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> JSONResponse:
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def status(request: Request, error: HTTPException) -> JSONResponse:
        return error_response(of_status(error.status_code, error.detail, error.headers))

    @app.exception_handler(RequestValidationError)
    async def validation(request: Request, error: RequestValidationError) -> JSONResponse:
        return error_response(of_validation(error.errors()))


def _openapi(app: FastAPI, settings: HttpSettings) -> dict[str, Any]:
    """FastAPI's document with our statuses: invalid bodies are 400, and the limits are those of this server."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        schemas = document["components"]["schemas"]
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        _limit(schemas["GenerationBody"]["properties"]["n"], settings.max_images)
        _limit(schemas["GenerationBody"]["properties"]["num_inference_steps"], settings.max_steps)
        if settings.api_key is not None:
            document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            document["security"] = [{"key": []}]
        app.openapi_schema = document
    return app.openapi_schema


def _limit(field: dict[str, Any], most: int) -> None:
    for choice in field["anyOf"]:
        if choice.get("type") == "integer":
            choice["maximum"] = most
