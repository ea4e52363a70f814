"""What travels between the two processes: a JSON header and the raw bytes of one float32 array or two.

A frame is two little-endian uint32 lengths, the header as UTF-8 JSON, then the arrays one after the other, C order;
the header's ``arrays`` holds their shapes. No pickle: reading one runs code, and requests carry what users sent, so the
standard library's multiprocessing, which pickles whatever it moves, is not used. A socket pair rather than shared
memory: frames are small beside a step, nothing is left behind when a process is killed, and the end of one process is
the end of the stream for the other.
"""

import json
import math
import socket
import struct
from asyncio import StreamReader
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.serving.contract import GenerationRequest

__all__ = ["Frame", "frame", "read_frame", "receive_frame", "request_from", "submission"]

Frame = tuple[dict[str, Any], list[NDArray[np.float32]]]

_LENGTHS = struct.Struct("<II")


def frame(kind: str, arrays: Sequence[NDArray[np.float32]] = (), **fields: object) -> bytes:
    """One frame; ``fields`` are JSON values."""
    header = json.dumps({"kind": kind, "arrays": [array.shape for array in arrays], **fields}).encode()
    payload = b"".join(np.ascontiguousarray(array, "<f4").tobytes() for array in arrays)
    return _LENGTHS.pack(len(header), len(payload)) + header + payload


def receive_frame(stream: socket.socket) -> Frame | None:
    """Wait for a frame on a blocking socket; None at the end of the stream."""
    lengths = _receive(stream, _LENGTHS.size)
    if lengths is None:
        return None
    header_size, payload_size = _LENGTHS.unpack(lengths)
    header, payload = _receive(stream, header_size), _receive(stream, payload_size)
    return None if header is None or payload is None else _parsed(header, payload)


async def read_frame(stream: StreamReader) -> Frame:
    """Wait for a frame.

    Raises:
        EOFError: the stream ended, between two frames or inside one.
    """
    header_size, payload_size = _LENGTHS.unpack(await stream.readexactly(_LENGTHS.size))
    return _parsed(await stream.readexactly(header_size), await stream.readexactly(payload_size))


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


def _receive(stream: socket.socket, size: int) -> bytes | None:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = stream.recv_into(view)
        if count == 0:
            return None
        view = view[count:]
    return bytes(data)


def _parsed(header: bytes, payload: bytes) -> Frame:
    fields = json.loads(header)
    arrays = []
    offset = 0
    for shape in fields["arrays"]:
        count = math.prod(shape)
        array = np.frombuffer(payload, "<f4", count, offset).reshape(shape)
        arrays.append(array.astype(np.float32))  # the caller's own, where the payload could not be written to
        offset += 4 * count
    return fields, arrays
