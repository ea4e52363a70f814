"""Contenders in processes of their own: they answer, their errors arrive, and each is timed as often as asked for."""

from collections import Counter
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from lib.apart import Apart, ApartSession, Stepper, timed_apart, turn_medians

from qdm_deploy.runtime.session import StepOutput


class Doubling:
    """A session that counts its steps."""

    max_batch = None
    interface = SimpleNamespace(input_names=("sample",))

    def __init__(self) -> None:
        self.steps = 0

    def run(self, inputs: Any) -> StepOutput:
        self.steps += 1
        return StepOutput(2 * inputs["sample"], np.full((1,), self.steps), np.zeros(1))


def doubling() -> Stepper:
    return Stepper(Doubling)  # type: ignore[arg-type]


def test_a_contender_answers_from_another_process() -> None:
    with Apart(partial(Counter, "aab")) as letters:
        assert letters.ask("most_common", 1) == [("a", 2)]
        with pytest.raises(RuntimeError, match="has no attribute 'least_common'"):
            letters.ask("least_common")


def test_a_contender_that_cannot_be_made_says_why() -> None:
    with pytest.raises(RuntimeError, match="invalid literal for int"):
        Apart(partial(int, "seven"))


def test_each_is_timed_as_often_as_asked_for() -> None:
    inputs = {"sample": np.arange(3.0), "another": np.zeros(3)}
    with Apart(doubling) as one, Apart(doubling) as other:
        both = {"one": inputs, "other": inputs}
        times = timed_apart({"one": one, "other": other}, both, runs=7, seconds=60)
        assert {name: len(values) for name, values in times.items()} == {"one": 7, "other": 7}
        assert min(times["one"] + times["other"]) > 0
        output = ApartSession(one, Doubling.interface).run({"sample": np.arange(3.0)})
        np.testing.assert_array_equal(output.next_sample, [0, 2, 4])
        assert output.x0[0] == 2 + 7 + 2 * 2 + 1  # prepared, timed in two turns that settle first, and asked


def test_what_takes_too_long_is_timed_less_often() -> None:
    with Apart(doubling) as one:
        assert len(timed_apart({"one": one}, {"one": {"sample": np.zeros(1)}}, runs=7, seconds=0)["one"]) == 1


def test_turns_have_a_median_each() -> None:
    assert turn_medians([1, 2, 9, 2, 2, 30, 10]).tolist() == [2, 20]
