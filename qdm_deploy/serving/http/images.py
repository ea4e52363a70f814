"""``POST /v1/images/generations``: one answer, or server-sent events in the shapes that the OpenAI client knows."""

import asyncio
import json
import logging
import uuid
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.responses import JSONResponse, Response
from starlette.types import Message

from qdm_deploy.errors import InputError
from qdm_deploy.serving.contract import AdmissionRefused, Finished, Generation, GenerationFailed
from qdm_deploy.serving.http.bodies import GenerationBody, ImageDocument, ImagesDocument
from qdm_deploy.serving.http.errors import ApiError, ErrorDocument, error_response, of_bug, of_failure, of_refusal
from qdm_deploy.serving.http.service import Service
from qdm_deploy.serving.http.translate import Order, size_of

__all__ = ["images_router"]

_LOG = logging.getLogger("qdm_deploy.http")
# A reader that takes nothing for this long is treated as gone, so that it cannot hold pictures in memory.
_SEND_TIMEOUT = 30.0
_PING_SECONDS = 10
_CLIENT_GONE = 499
_NO_TOKENS = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}


def images_router(service: Service) -> APIRouter:
    """The route, on a service."""
    router = APIRouter(tags=["images"])

    @router.post(
        "/v1/images/generations",
        response_model=ImagesDocument,
        responses={
            200: {"description": "The images; with stream, events.", "content": {"text/event-stream": {}}},
            **{status: {"model": ErrorDocument} for status in (404, 429, 500, 503, 504)},
        },
        summary="Generate images",
    )
    async def generate(body: GenerationBody, request: Request) -> Response:
        generation, order = await _submit(service, body, request)
        if order.stream:

            async def left(message: Message) -> None:
                # The events' own end does this too, but events that never began have no end.
                generation.cancel()

            return EventSourceResponse(
                _events(service, order, generation, request.state.request_id),
                ping=_PING_SECONDS,
                send_timeout=_SEND_TIMEOUT,
                client_close_handler_callable=left,
            )
        try:
            finished = await _while_connected(generation, request)
        except GenerationFailed as failure:
            raise of_failure(failure) from failure
        finally:
            generation.cancel()
        if finished is None:
            return error_response(ApiError(_CLIENT_GONE, "the client left"))
        document = ImagesDocument(
            created=service.now(),
            data=await _images(service, order, finished),
            output_format=order.output_format,
            size=size_of(service.engine.model),
        )
        return JSONResponse(document.model_dump())

    return router


async def _submit(service: Service, body: GenerationBody, request: Request) -> tuple[Generation, Order]:
    """Admit a request or say why not; nothing expensive has happened until then."""
    order = await service.order(body, uuid.uuid4().hex)
    request.state.generation_id = order.request.request_id
    try:
        return service.engine.submit(order.request), order
    except AdmissionRefused as refusal:
        raise of_refusal(refusal, service.settings.queue_full_status) from refusal
    except InputError as error:
        raise ApiError(400, str(error), code="invalid_value") from error


async def _while_connected(generation: Generation, request: Request) -> Finished | None:
    """The images, or None once the client has left."""
    result = asyncio.ensure_future(generation.result())
    gone = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait({result, gone}, return_when=asyncio.FIRST_COMPLETED)
        return result.result() if result.done() else None
    finally:
        for task in (result, gone):
            task.cancel()
        await asyncio.gather(result, gone, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _images(service: Service, order: Order, finished: Finished) -> list[ImageDocument]:
    seeds = order.request.seeds
    pictures = await service.pictures(order, range(len(seeds)), finished.samples)
    return [
        ImageDocument(b64_json=picture, seed=seed, class_label=name)
        for picture, seed, name in zip(pictures, seeds, order.captions, strict=True)
    ]


def _error_event(error: ApiError) -> ServerSentEvent:
    return ServerSentEvent(json.dumps(error.document), event="error", sep="\n")


async def _events(
    service: Service, order: Order, generation: Generation, request_id: str
) -> AsyncIterator[ServerSentEvent]:
    """Previews as they come, then each image; an error is an event, because the status has been sent by then."""
    shown = [0] * len(order.request.seeds)

    def event(kind: str, **content: Any) -> ServerSentEvent:
        document = {
            "type": f"image_generation.{kind}",
            "background": "opaque",
            "created_at": service.now(),
            "output_format": order.output_format,
            "quality": "auto",
            "size": size_of(service.engine.model),
            **content,
        }
        return ServerSentEvent(json.dumps(document), event=document["type"], sep="\n")

    try:
        async for preview in generation.previews():
            # What is not finite ends the request in the engine; a picture of it would only hide the reason.
            if not np.isfinite(preview.x0).all():
                continue
            (picture,) = await service.pictures(order, [preview.image], preview.x0[None])
            yield event(
                "partial_image",
                b64_json=picture,
                partial_image_index=shown[preview.image],
                image_index=preview.image,
                seed=order.request.seeds[preview.image],
                step=preview.step,
                steps=preview.steps,
            )
            shown[preview.image] += 1
        finished = await generation.result()
        for index, image in enumerate(await _images(service, order, finished)):
            yield event(
                "completed",
                b64_json=image.b64_json,
                image_index=index,
                seed=image.seed,
                class_label=image.class_label,
                usage=_NO_TOKENS,
            )
    except GenerationFailed as failure:
        yield _error_event(of_failure(failure))
    except Exception:  # noqa: BLE001 - the status has been sent, so the client can only learn of it here
        _LOG.exception("stream failed", extra={"request_id": request_id})
        yield _error_event(of_bug(request_id))
    finally:
        generation.cancel()
