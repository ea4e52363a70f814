"""A request as a frame, on its way to the process that runs it."""

from qdm_deploy.child_process import Frame, frame
from qdm_deploy.samplers.conditioning import Conditioning
from qdm_deploy.serving.contract import GenerationRequest

__all__ = ["request_from", "submission"]


def submission(request: GenerationRequest, deadline: float | None) -> bytes:
    """The frame that hands a request over; ``deadline`` is a time of ``time.monotonic``, the same in both processes."""
    own, unconditional = request.conditioning.own, request.conditioning.unconditional
    return frame(
        "submit",
        [*own.values(), *(unconditional or {}).values()],
        request_id=request.request_id,
        seeds=request.seeds,
        sampler=request.sampler,
        steps=request.steps,
        eta=request.eta,
        guidance=request.guidance,
        guidance_rescale=request.guidance_rescale,
        own=list(own),
        unconditional=None if unconditional is None else list(unconditional),
        previews=request.previews,
        deadline=deadline,
    )


def request_from(received: Frame) -> tuple[GenerationRequest, float | None]:
    """The request of a ``submission``, and its deadline."""
    header, arrays = received
    given = iter(arrays)
    own = {name: next(given) for name in header["own"]}
    names = header["unconditional"]
    unconditional = None if names is None else {name: next(given) for name in names}
    request = GenerationRequest(
        request_id=header["request_id"],
        seeds=tuple(header["seeds"]),
        sampler=header["sampler"],
        steps=header["steps"],
        eta=header["eta"],
        guidance=header["guidance"],
        guidance_rescale=header["guidance_rescale"],
        conditioning=Conditioning(own, unconditional),
        previews=header["previews"],
    )
    return request, header["deadline"]
