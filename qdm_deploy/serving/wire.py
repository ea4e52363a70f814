"""A request as a frame, on its way to the process that runs it."""

from qdm_deploy.child_process import Frame, frame
from qdm_deploy.serving.contract import GenerationRequest

__all__ = ["request_from", "submission"]


def submission(request: GenerationRequest, deadline: float | None) -> bytes:
    """The frame that hands a request over; ``deadline`` is a time of ``time.monotonic``, the same in both processes."""
    states = (request.encoder_hidden_states, request.null_hidden_states)
    return frame(
        "submit",
        [state for state in states if state is not None],
        request_id=request.request_id,
        seeds=request.seeds,
        sampler=request.sampler,
        steps=request.steps,
        eta=request.eta,
        guidance=request.guidance,
        class_labels=request.class_labels,
        states=[state is not None for state in states],
        previews=request.previews,
        deadline=deadline,
    )


def request_from(received: Frame) -> tuple[GenerationRequest, float | None]:
    """The request of a ``submission``, and its deadline."""
    header, arrays = received
    given = iter(arrays)
    states = [next(given) if there else None for there in header["states"]]
    labels = header["class_labels"]
    request = GenerationRequest(
        request_id=header["request_id"],
        seeds=tuple(header["seeds"]),
        sampler=header["sampler"],
        steps=header["steps"],
        eta=header["eta"],
        guidance=header["guidance"],
        class_labels=None if labels is None else tuple(labels),
        encoder_hidden_states=states[0],
        null_hidden_states=states[1],
        previews=header["previews"],
    )
    return request, header["deadline"]
