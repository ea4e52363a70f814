from typing import Any

import numpy as np
import pytest

from qdm_deploy.artifacts.pipeline_spec import Denoiser, PipelineSpec, StatesFile
from qdm_deploy.artifacts.step_interface import StepInterface, TensorSpec
from qdm_deploy.errors import InputError
from qdm_deploy.samplers.columns import COEFFICIENTS
from qdm_deploy.samplers.conditioning import Conditioning
from qdm_deploy.serving.contract import GenerationRequest
from qdm_deploy.serving.jobs import JobMaker
from tests.serving.engine.fake import MODEL, NULL, SCHEDULE, labels


def of(name: str, *conditions: TensorSpec) -> PipelineSpec:
    interface = StepInterface.of(
        (4, 2, 2), conditions, coefficients=len(COEFFICIENTS), rescaled_guidance=bool(conditions)
    )
    encoder = [StatesFile(inputs=tuple(spec.name for spec in conditions))] if conditions else []
    return PipelineSpec(name=name, components=(Denoiser(interface=interface, num_train_timesteps=100), *encoder))


# Two conditions, as of a text model that is told sizes too.
TEXT = of(
    "text", TensorSpec(name="encoder_hidden_states", row_shape=(3, 2)), TensorSpec(name="time_ids", row_shape=(6,))
)
PLAIN = of("plain")


def states(count: int = 2, **changes: Any) -> dict[str, Any]:
    rng = np.random.default_rng(count)
    made = {"encoder_hidden_states": rng.normal(size=(count, 3, 2)), "time_ids": rng.normal(size=(count, 6))}
    return {name: value.astype(np.float32) for name, value in made.items()} | changes


def make(model: PipelineSpec = MODEL, max_rows: int = 8, **fields: Any) -> Any:
    given = {"request_id": "r", "seeds": (1, 2), "steps": 4, **fields}
    if model is MODEL:
        given.setdefault("conditioning", labels((0, 1)))
    return JobMaker(model, SCHEDULE, max_rows).job(GenerationRequest(**given))


def test_a_job_has_the_rows_of_its_guidance() -> None:
    guided, plain = make(guidance=2.0), make()
    assert (guided.rows_each, guided.images, guided.steps) == (2, 2, 4)
    assert (plain.rows_each, plain.sampling.guidance) == (1, 1.0)
    assert guided.sampling.conditioning.unconditional["class_labels"].tolist() == [NULL]


def test_every_condition_reaches_the_job() -> None:
    wanted = Conditioning(states(), states(1))
    job = make(TEXT, conditioning=wanted, guidance=2.0, guidance_rescale=0.7)
    assert job.sampling.conditioning is wanted
    assert job.sampling.guidance_rescale == 0.7


def test_equal_samplers_share_a_table() -> None:
    maker = JobMaker(PLAIN, SCHEDULE, 8)
    tables = [maker.job(GenerationRequest(name, (1,), steps=5)).sampling.table for name in "ab"]
    assert tables[0] is tables[1]


@pytest.mark.parametrize(
    ("model", "fields", "message"),
    [
        (MODEL, {"request_id": ""}, "the request has no id"),
        (MODEL, {"seeds": (), "conditioning": labels(())}, "no seeds were given"),
        (MODEL, {"seeds": (1, 2**63)}, "seed 9223372036854775808 is out of range"),
        (MODEL, {"seeds": (-1, 2)}, "seed -1 is out of range"),
        (MODEL, {"sampler": "magic"}, "sampler 'magic' is unknown; choose one of "),
        (MODEL, {"steps": 101}, "steps=101 is out of range"),
        (MODEL, {"eta": float("nan")}, "eta=nan is out of range"),
        (MODEL, {"guidance": float("nan")}, "the guidance scale is nan"),
        (MODEL, {"guidance": 1e39}, "the guidance scale is 1e\\+39"),
        (MODEL, {"guidance_rescale": 0.5}, "guidance cannot be rescaled"),
        (MODEL, {"conditioning": labels((0, 1, 2))}, r"class_labels is int64 \[3\]; 2 images need int64 \[2\]"),
        (MODEL, {"conditioning": labels((0, 9))}, "class_labels holds 9; this model knows 0 to 4"),
        (MODEL, {"conditioning": labels((-1, 0))}, "class_labels holds -1; this model knows 0 to 4"),
        (MODEL, {"conditioning": Conditioning()}, "is conditioned on class_labels; given: nothing"),
        (MODEL, {"guidance": 2.0, "max_rows": 1}, "two rows an image and this engine runs one"),
        (MODEL, {"previews": -1}, "-1 previews"),
        (MODEL, {"deadline": 0.0}, "the deadline is 0.0 seconds"),
        (MODEL, {"deadline": float("nan")}, "the deadline is nan seconds"),
        (PLAIN, {"guidance": 2.0}, "the model is unconditional"),
        (PLAIN, {"conditioning": labels((0, 1))}, "is conditioned on nothing; given: class_labels"),
        (TEXT, {}, "is conditioned on encoder_hidden_states, time_ids; given: nothing"),
        (
            TEXT,
            {"conditioning": Conditioning(states(encoder_hidden_states=np.zeros((2, 2, 2), np.float32)))},
            r"encoder_hidden_states is float32 \[2, 2, 2\]; 2 images need float32 \[2, 3, 2\]",
        ),
        (
            TEXT,
            {"conditioning": Conditioning(states(time_ids=np.full((2, 6), np.inf, np.float32)))},
            "time_ids holds NaN or infinity",
        ),
        (TEXT, {"conditioning": Conditioning(states()), "guidance": 2.0}, "guidance needs what the model sees"),
    ],
)
def test_a_request_that_does_not_fit_is_refused(model: PipelineSpec, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(model, **fields)
