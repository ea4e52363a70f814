"""Rows go where their timestep says, and come back in their own order."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from qdm_deploy.backends import MixedSession, OnnxRuntimeSession
from qdm_deploy.errors import InputError
from qdm_deploy.runtime import StepOutput

BELOW = 50


class Recorder:
    """A step that adds ``shift`` to the sample of a row's owner; keeps what it was given."""

    def __init__(self, shift: float, names: tuple[str, ...], max_batch: int | None = None) -> None:
        self.shift, self.input_names, self.max_batch = shift, names, max_batch
        self.given: list[Mapping[str, NDArray[Any]]] = []
        self.last: StepOutput | None = None
        self.closed = 0

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> StepOutput:
        self.given.append(inputs)
        sample = inputs["sample"][inputs["owner_row"]] if "owner_row" in inputs else inputs["sample"]
        self.last = StepOutput(sample + np.float32(self.shift), sample * np.float32(2))
        return self.last

    def describe(self) -> dict[str, object]:
        return {"backend": "onnxruntime", "shift": self.shift}

    def close(self) -> None:
        self.closed += 1

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


PLAIN = ("sample", "timestep")
GUIDED = (*PLAIN, "unconditional_row", "owner_row")


def mixed(names: tuple[str, ...] = PLAIN, **limits: int | None) -> tuple[MixedSession, Recorder, Recorder]:
    int8 = Recorder(100, names, limits.get("int8"))
    floating = Recorder(1000, names, limits.get("floating"))
    return MixedSession(int8, floating, BELOW), int8, floating


def batch(*timesteps: int, **more: list[int]) -> dict[str, NDArray[Any]]:
    rows = np.arange(len(timesteps), dtype=np.float32).reshape(-1, 1, 1, 1) * np.ones((1, 1, 2, 2), np.float32)
    return {
        "sample": rows,
        "timestep": np.array(timesteps, np.int64),
        **{name: np.array(values, np.int64) for name, values in more.items()},
    }


@pytest.mark.parametrize(("timestep", "used"), [(BELOW, 0), (BELOW - 1, 1), (999, 0), (0, 1)])
def test_a_batch_of_one_kind_is_passed_on_without_a_copy(timestep: int, used: int) -> None:
    session, *parts = mixed()
    inputs = batch(timestep, timestep)
    result = session.run(inputs)
    assert [len(part.given) for part in parts] == [1 - used, used]
    assert parts[used].given[0] is inputs
    assert result is parts[used].last


def test_rows_of_both_kinds_come_back_in_their_order() -> None:
    session, int8, floating = mixed()
    result = session.run(batch(7, 60, 49, 50, 999))
    assert result.next_sample[:, 0, 0, 0].tolist() == [1000, 101, 1002, 103, 104]
    assert result.x0[:, 0, 1, 1].tolist() == [0, 2, 4, 6, 8]
    assert int8.given[0]["timestep"].tolist() == [60, 50, 999]
    assert floating.given[0]["timestep"].tolist() == [7, 49]
    assert result.next_sample.dtype == np.float32
    assert all(array.flags.c_contiguous for array in (*int8.given[0].values(), *floating.given[0].values()))


def test_links_between_the_rows_of_a_sample_stay_right_in_the_parts() -> None:
    session, int8, floating = mixed(GUIDED)
    # Samples are the rows (0, 3), (1, 2), (4, 5); the middle one and the last run in INT8.
    result = session.run(
        batch(3, 80, 80, 3, 70, 70, unconditional_row=[3, 2, 2, 3, 5, 5], owner_row=[0, 1, 1, 0, 4, 4])
    )
    assert int8.given[0]["unconditional_row"].tolist() == [1, 1, 3, 3]
    assert int8.given[0]["owner_row"].tolist() == [0, 0, 2, 2]
    assert floating.given[0]["unconditional_row"].tolist() == [1, 1]
    assert floating.given[0]["owner_row"].tolist() == [0, 0]
    assert result.next_sample[:, 0, 0, 0].tolist() == [1000, 101, 101, 1000, 104, 104]


def test_a_sample_whose_rows_take_different_steps_is_refused() -> None:
    session, int8, floating = mixed(GUIDED)
    with pytest.raises(InputError, match=r"unconditional_row of row 0 \(timestep 3\) is 1 \(timestep 80\)"):
        session.run(batch(3, 80, unconditional_row=[1, 1], owner_row=[0, 0]))
    with pytest.raises(InputError, match=r"owner_row of row 1 is 7; rows of this batch are 0 to 1"):
        session.run(batch(3, 80, unconditional_row=[0, 1], owner_row=[0, 7]))
    assert int8.given == floating.given == []


def test_the_smaller_limit_counts() -> None:
    assert mixed()[0].max_batch is None
    assert mixed(int8=4)[0].max_batch == 4
    assert mixed(int8=4, floating=2)[0].max_batch == 2


def test_both_parts_are_described_and_closed() -> None:
    session, int8, floating = mixed()
    with session:
        assert session.describe() == {
            "backend": "onnxruntime",
            "shift": 100,
            "float_below": BELOW,
            "float": {"backend": "onnxruntime", "shift": 1000},
        }
    assert (int8.closed, floating.closed) == (1, 1)


def test_what_does_not_belong_together_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"the INT8 graph takes sample, timestep and the float graph sample, timestep, un"
    ):
        MixedSession(Recorder(0, PLAIN), Recorder(0, GUIDED), BELOW)
    with pytest.raises(InputError, match=r"float_below is 0; give a timestep of at least 1"):
        MixedSession(Recorder(0, PLAIN), Recorder(0, PLAIN), 0)


def test_real_sessions_split_a_guided_batch_and_refuse_a_wrong_one(labelled: Any) -> None:
    from qdm_deploy.runtime.random_inputs import random_inputs

    inputs = random_inputs(labelled.spec, 6)
    inputs["timestep"] = np.array([2, 90, 2, 90, 60, 60])
    inputs["guidance"] = np.full(6, 2.5, np.float32)
    inputs["unconditional_row"] = np.array([2, 3, 2, 3, 5, 5])
    inputs["owner_row"] = np.array([0, 1, 0, 1, 4, 4])
    with OnnxRuntimeSession(labelled.graph) as whole:
        expected = whole.run(inputs)
        with MixedSession(OnnxRuntimeSession(labelled.graph), OnnxRuntimeSession(labelled.graph), BELOW) as session:
            result = session.run(inputs)
            np.testing.assert_allclose(result.next_sample, expected.next_sample, rtol=1e-6, atol=1e-6)
            np.testing.assert_allclose(result.x0, expected.x0, rtol=1e-6, atol=1e-6)
            with pytest.raises(InputError, match="missing: timestep"):
                session.run({name: values for name, values in inputs.items() if name != "timestep"})
            with pytest.raises(InputError, match=r"noise is float32 \[5, "):
                session.run({**inputs, "noise": inputs["noise"][:5]})
