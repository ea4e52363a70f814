import asyncio
import socket

import numpy as np
import pytest

from qdm_deploy.serving.contract import GenerationRequest
from qdm_deploy.serving.wire import frame, read_frame, receive_frame, request_from, submission


def test_a_request_arrives_as_it_was_sent() -> None:
    rng = np.random.default_rng(0)
    states, null = rng.standard_normal((2, 3, 5)).astype(np.float32)
    request = GenerationRequest(
        "id", (0, 2**63 - 1), "dpmpp-2m", 7, 0.25, -1.5, (3, 4), states, null, deadline=4.0, previews=2
    )
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(submission(request, 12.5) + frame("cancel", request_id="id"))
        first, second = receive_frame(theirs), receive_frame(theirs)
        assert first is not None
        assert second == ({"kind": "cancel", "arrays": [], "request_id": "id"}, [])
        received, deadline = request_from(first)
    assert deadline == 12.5
    for name in ("request_id", "seeds", "sampler", "steps", "eta", "guidance", "class_labels", "previews"):
        assert getattr(received, name) == getattr(request, name)
    np.testing.assert_array_equal(received.encoder_hidden_states, states)
    np.testing.assert_array_equal(received.null_hidden_states, null)
    plain, _ = request_from(({**first[0], "states": [False, True], "class_labels": None}, [null]))
    assert plain.encoder_hidden_states is None
    assert plain.class_labels is None
    np.testing.assert_array_equal(plain.null_hidden_states, null)


def test_arrays_keep_their_bits_and_are_the_readers_own() -> None:
    values = np.array([[np.nan, -np.inf, 1e-45]], np.float32)

    async def body() -> None:
        reader = asyncio.StreamReader()
        reader.feed_data(frame("done", [values, values[:, ::2]], request_id="a"))
        reader.feed_eof()
        _, (first, second) = await read_frame(reader)
        assert first.tobytes() == values.tobytes()
        np.testing.assert_array_equal(second, values[:, ::2])
        first[0, 0] = 0
        with pytest.raises(EOFError):
            await read_frame(reader)

    asyncio.run(body())


@pytest.mark.parametrize("kept", [3, 10, -1])
def test_a_stream_that_ends_inside_a_frame_is_an_end(kept: int) -> None:
    data = frame("done", [np.zeros(4, np.float32)], request_id="a")[:kept]
    ours, theirs = socket.socketpair()
    with theirs:
        with ours:
            ours.sendall(data)
        assert receive_frame(theirs) is None
