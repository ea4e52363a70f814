"""What travels between the two processes: a JSON header and the raw bytes of its arrays.

A frame is two little-endian uint32 lengths, the header as UTF-8 JSON, then the arrays one after the other, C order;
the header's ``arrays`` holds their types and shapes. No pickle: reading one runs code, and requests carry what users
sent, so the standard library's multiprocessing, which pickles whatever it moves, is not used. A socket pair rather than
shared memory: frames are small beside a step, nothing is left behind when a process is killed, and the end of one
process is the end of the stream for the other.
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

from qdm_deploy.samplers.conditioning import Conditioning
from qdm_deploy.serving.contract import GenerationRequest

__all__ = ["Frame", "frame", "read_frame", "receive_frame", "request_from", "submission"]

Frame = tuple[dict[str, Any], list[NDArray[Any]]]

_LENGTHS = struct.Struct("<II")
_TYPES = {"float32": "<f4", "int64": "<i8"}


def frame(kind: str, arrays: Sequence[NDArray[Any]] = (), **fields: object) -> bytes:
    """One frame; ``fields`` are JSON values."""
    described = [(_TYPES[array.dtype.name], array.shape) for array in arrays]
    header = json.dumps({"kind": kind, "arrays": described, **fields}).encode()
    payload = b"".join(
        np.ascontiguousarray(array, code).tobytes() for array, (code, _) in zip(arrays, described, strict=True)
    )
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
    for code, shape in fields["arrays"]:
        array = np.frombuffer(payload, code, math.prod(shape), offset).reshape(shape)
        offset += array.nbytes
        arrays.append(array.astype(array.dtype.newbyteorder("=")))  # the caller's own: the payload cannot be written to
    return fields, arrays
