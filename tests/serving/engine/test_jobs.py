from typing import Any

import numpy as np
import pytest

from qdm_deploy.artifacts.model_spec import ConditioningInput, ModelSpec
from qdm_deploy.errors import InputError
from qdm_deploy.serving.contract import GenerationRequest
from qdm_deploy.serving.jobs import JobMaker
from tests.serving.engine.fake import MODEL, NULL, SCHEDULE

TEXT = ModelSpec(
    name="text",
    sample_shape=(4, 2, 2),
    num_train_timesteps=100,
    conditioning=(ConditioningInput(name="encoder_hidden_states", dtype="float32", shape=(3, 2)),),
)
PLAIN = ModelSpec(name="plain", sample_shape=(1, 2, 2), num_train_timesteps=100)


def make(model: ModelSpec = MODEL, max_rows: int = 8, **fields: Any) -> Any:
    given = {"request_id": "r", "seeds": (1, 2), "steps": 4, **fields}
    if model is MODEL:
        given.setdefault("class_labels", (0, 1))
    return JobMaker(model, SCHEDULE, max_rows).job(GenerationRequest(**given))


def test_labels_of_each_image_with_its_twin() -> None:
    job = make(guidance=2.0)
    assert job.rows_each == 2
    assert [job.conditioning(image)["class_labels"].tolist() for image in (0, 1)] == [[0, NULL], [1, NULL]]
    assert make().conditioning(1)["class_labels"].tolist() == [1]


def test_text_states_are_shared_by_the_images() -> None:
    states = np.arange(6, dtype=np.float32).reshape(3, 2)
    job = make(TEXT, encoder_hidden_states=states, null_hidden_states=-states, guidance=2.0)
    for image in (0, 1):
        np.testing.assert_array_equal(job.conditioning(image)["encoder_hidden_states"], [states, -states])
    np.testing.assert_array_equal(
        make(TEXT, encoder_hidden_states=states).conditioning(1)["encoder_hidden_states"], [states]
    )


def test_equal_samplers_share_a_table() -> None:
    maker = JobMaker(PLAIN, SCHEDULE, 8)
    tables = [maker.job(GenerationRequest(name, (1,), steps=5)).table for name in "ab"]
    assert tables[0] is tables[1]


@pytest.mark.parametrize(
    ("model", "fields", "message"),
    [
        (MODEL, {"request_id": ""}, "the request has no id"),
        (MODEL, {"seeds": (), "class_labels": ()}, "no seeds were given"),
        (MODEL, {"seeds": (1, 2**63)}, "seed 9223372036854775808 is out of range"),
        (MODEL, {"seeds": (-1, 2)}, "seed -1 is out of range"),
        (MODEL, {"sampler": "magic"}, "sampler 'magic' is unknown; choose one of ddpm, ddim"),
        (MODEL, {"steps": 101}, "steps=101 is out of range"),
        (MODEL, {"eta": float("nan")}, "eta=nan is out of range"),
        (MODEL, {"guidance": float("nan")}, "the guidance scale is nan"),
        (MODEL, {"guidance": 1e39}, "the guidance scale is 1e\\+39"),
        (MODEL, {"class_labels": (0,)}, "1 class labels were given for 2 images"),
        (MODEL, {"class_labels": (0, 9)}, "the class label 9 is unknown"),
        (MODEL, {"class_labels": None}, "needs class_labels"),
        (MODEL, {"guidance": 2.0, "max_rows": 1}, "two rows an image and this engine runs one"),
        (MODEL, {"previews": -1}, "-1 previews"),
        (MODEL, {"deadline": 0.0}, "the deadline is 0.0 seconds"),
        (MODEL, {"deadline": float("nan")}, "the deadline is nan seconds"),
        (PLAIN, {"guidance": 2.0}, "'plain' is unconditional"),
        (PLAIN, {"class_labels": (0, 1)}, "'plain' takes no class_labels"),
        (TEXT, {}, "'text' needs encoder_hidden_states"),
        (TEXT, {"encoder_hidden_states": np.zeros((2, 2), np.float32)}, r"shape \[1, 2, 2\]; 1 samples need"),
        (TEXT, {"encoder_hidden_states": np.full((3, 2), np.inf, np.float32)}, "of the request r holds NaN or infin"),
        (TEXT, {"encoder_hidden_states": np.zeros((3, 2), np.float32), "guidance": 2.0}, "needs null_hidden_states"),
    ],
)
def test_a_request_that_does_not_fit_is_refused(model: ModelSpec, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(model, **fields)
