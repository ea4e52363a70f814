import numpy as np

from qdm_deploy.serving.contract import GenerationRequest
from qdm_deploy.serving.wire import request_from, submission
from tests.runtime.test_child_process import received


def test_a_request_arrives_as_it_was_sent() -> None:
    rng = np.random.default_rng(0)
    states, null = rng.standard_normal((2, 3, 5)).astype(np.float32)
    request = GenerationRequest(
        "id", (0, 2**63 - 1), "dpmpp-2m", 7, 0.25, -1.5, (3, 4), states, null, deadline=4.0, previews=2
    )
    (sent,) = received(submission(request, 12.5))
    arrived, deadline = request_from(sent)
    assert deadline == 12.5
    for name in ("request_id", "seeds", "sampler", "steps", "eta", "guidance", "class_labels", "previews"):
        assert getattr(arrived, name) == getattr(request, name)
    np.testing.assert_array_equal(arrived.encoder_hidden_states, states)
    np.testing.assert_array_equal(arrived.null_hidden_states, null)
    plain, _ = request_from(({**sent[0], "states": [False, True], "class_labels": None}, [null]))
    assert plain.encoder_hidden_states is None
    assert plain.class_labels is None
    np.testing.assert_array_equal(plain.null_hidden_states, null)
