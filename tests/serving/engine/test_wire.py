import numpy as np

from qdm_deploy.samplers.conditioning import Conditioning
from qdm_deploy.serving.contract import GenerationRequest
from qdm_deploy.serving.wire import request_from, submission
from tests.runtime.test_child_process import received


def test_a_request_arrives_as_it_was_sent() -> None:
    rng = np.random.default_rng(0)
    own = {"encoder_hidden_states": rng.standard_normal((2, 3, 5)).astype(np.float32), "kinds": np.array([3, 2**40])}
    null = {"kinds": np.array([0]), "encoder_hidden_states": np.zeros((1, 3, 5), np.float32)}
    request = GenerationRequest(
        "id", (0, 2**63 - 1), "dpmpp-2m", 7, 0.25, -1.5, 0.5, Conditioning(own, null), deadline=4.0, previews=2
    )
    (sent,) = received(submission(request, 12.5))
    arrived, deadline = request_from(sent)
    assert deadline == 12.5
    for name in ("request_id", "seeds", "sampler", "steps", "eta", "guidance", "guidance_rescale", "previews"):
        assert getattr(arrived, name) == getattr(request, name)
    for found, given in ((arrived.conditioning.own, own), (arrived.conditioning.unconditional, null)):
        assert found is not None
        assert list(found) == list(given)
        for name, values in given.items():
            assert found[name].dtype == values.dtype
            np.testing.assert_array_equal(found[name], values)
    plain, _ = request_from(received(submission(GenerationRequest("id", (1,)), None))[0])
    assert plain.conditioning.own == {}
    assert plain.conditioning.unconditional is None
