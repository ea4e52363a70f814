"""What is served and how it is doing: OpenAI's model list, the Open Inference Protocol's metadata, health, metrics."""

from typing import Any, Literal

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.responses import Response

from qdm_deploy.artifacts.pipeline_spec import LabelTable
from qdm_deploy.artifacts.record import installed_version
from qdm_deploy.components.encoders import open_encoder
from qdm_deploy.samplers import SAMPLERS
from qdm_deploy.serving.http.bodies import (
    EngineDocument,
    ModelDocument,
    ModelsDocument,
    RunningDocument,
    StepDocument,
)
from qdm_deploy.serving.http.errors import ApiError, ErrorDocument
from qdm_deploy.serving.http.service import Service
from qdm_deploy.serving.http.settings import MAX_PREVIEWS
from qdm_deploy.serving.http.translate import size_of

__all__ = ["health_router", "metadata_router"]

_RETRY_SECONDS = 2.0


class LiveDocument(BaseModel):
    """The process works, or can work again without being replaced."""

    live: bool


class ReadyDocument(BaseModel):
    """Requests are admitted."""

    ready: bool


class TensorDocument(BaseModel):
    """One tensor of the Open Inference Protocol."""

    name: str
    datatype: str
    shape: list[int]


class ServerDocument(BaseModel):
    """``GET /v2``."""

    name: Literal["qdm-deploy"] = "qdm-deploy"
    version: str
    extensions: list[str]


class ServedModelDocument(BaseModel):
    """``GET /v2/models/{name}``; the version is the bundle's id."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorDocument]
    outputs: list[TensorDocument]


def health_router(service: Service) -> APIRouter:
    """Liveness and readiness, under the paths that probes use."""
    router = APIRouter(tags=["health"], responses={503: {"model": ErrorDocument}})

    @router.get("/health/live")
    @router.get("/v2/health/live")
    async def live() -> LiveDocument:
        if service.engine.state.phase == "dead":
            raise ApiError(
                503,
                "the engine is dead: replace this process",
                code="engine_dead",
                retry=True,
                retry_after=_RETRY_SECONDS,
            )
        return LiveDocument(live=True)

    @router.get("/health")
    @router.get("/health/ready")
    @router.get("/v2/health/ready")
    async def ready() -> ReadyDocument:
        _check_ready(service)
        return ReadyDocument(ready=True)

    return router


def metadata_router(service: Service) -> APIRouter:
    """The model, the engine's state and the metrics."""
    router = APIRouter(tags=["metadata"])
    model = service.engine.model
    missing: dict[int | str, dict[str, Any]] = {404: {"model": ErrorDocument}}

    @router.get("/v1/models")
    async def models() -> ModelsDocument:
        return ModelsDocument(data=[_model_document(service)])

    @router.get("/v1/models/{name}", responses=missing)
    async def one_model(name: str) -> ModelDocument:
        _check_name(name, model.name)
        return _model_document(service)

    @router.get("/v1/engine")
    async def engine() -> EngineDocument:
        state = service.engine.state
        return EngineDocument(
            phase=state.phase,
            running_rows=state.running_rows,
            max_rows=state.max_rows,
            waiting=state.waiting,
            max_waiting=state.max_waiting,
            restarts=state.restarts,
            backend=state.backend,
            running=[
                RunningDocument(id=name, step=step, steps=steps, rows=rows) for name, step, steps, rows in state.running
            ],
            total_steps=service.metrics.total_steps,
            recent_steps=[
                StepDocument(rows=rows, padding_rows=padding, seconds=seconds)
                for rows, padding, seconds in service.metrics.recent
            ],
        )

    @router.get("/v2")
    async def server() -> ServerDocument:
        return ServerDocument(version=installed_version() or "unknown", extensions=[])

    @router.get("/v2/models/{name}", responses=missing)
    async def served_model(name: str) -> ServedModelDocument:
        _check_name(name, model.name)
        return ServedModelDocument(
            name=model.name,
            versions=[service.settings.bundle_id],
            platform=f"onnx_{service.engine.state.backend.get('backend', 'unknown')}",
            inputs=[TensorDocument(name="prompt", datatype="BYTES", shape=[1])],
            outputs=[TensorDocument(name="image", datatype="BYTES", shape=[1])],
        )

    @router.get("/v2/models/{name}/ready", responses={**missing, 503: {"model": ErrorDocument}})
    async def model_ready(name: str) -> ReadyDocument:
        _check_name(name, model.name)
        _check_ready(service)
        return ReadyDocument(ready=True)

    @router.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return router


def _model_document(service: Service) -> ModelDocument:
    model, settings = service.engine.model, service.settings
    most = min(settings.max_steps, model.denoiser.num_train_timesteps)
    labels = model.encoder if isinstance(model.encoder, LabelTable) else None
    return ModelDocument(
        id=model.name,
        created=service.created,
        bundle_id=settings.bundle_id,
        size=size_of(model),
        num_classes=None if labels is None else labels.num_classes,
        labels=None if labels is None or labels.labels is None else list(labels.labels),
        guidance=open_encoder(model).can_be_guided,
        samplers=list(SAMPLERS),
        default_steps=min(settings.default_steps, most),
        max_steps=most,
        max_images=settings.max_images,
        max_previews=MAX_PREVIEWS,
    )


def _check_name(name: str, served: str) -> None:
    if name != served:
        raise ApiError(
            404, f"the model {name[:100]!a} is not served here; it is {served!a}", code="model_not_found", param="model"
        )


def _check_ready(service: Service) -> None:
    phase = service.engine.state.phase
    if phase != "ready":
        raise ApiError(
            503,
            f"no request is admitted now: the engine is {phase}",
            code=phase,
            retry=True,
            retry_after=_RETRY_SECONDS,
        )
