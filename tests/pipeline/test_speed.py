"""Times per step, taken in turn."""

import time
from typing import Any

import numpy as np
import pytest

from qdm_deploy.artifacts.pipeline_spec import Denoiser
from qdm_deploy.artifacts.step_interface import StepInterface, TensorSpec
from qdm_deploy.building.speed import measure_speed, speedup_of
from qdm_deploy.report.model import SpeedRow
from qdm_deploy.runtime.session import StepOutput
from qdm_deploy.runtime.timing import runs_in_all, timed_in_turn
from qdm_deploy.samplers.random_inputs import random_inputs

MODEL = Denoiser(
    interface=StepInterface.of(
        (1, 2, 2),
        [TensorSpec(name="class_labels", dtype="int64"), TensorSpec(name="text_embeds", row_shape=(5, 4))],
        coefficients=15,
    ),
    num_train_timesteps=50,
    learned_variance=True,
    limits={"class_labels": 3},
)


class Sleeper:
    """A session that takes a known time."""

    max_batch = None
    interface = MODEL.interface

    def __init__(self, name: str, seconds: float, log: list[str]) -> None:
        self.name, self.seconds, self.log = name, seconds, log

    def run(self, inputs: Any) -> StepOutput:
        self.log.append(self.name)
        time.sleep(self.seconds)
        return StepOutput(inputs["sample"], inputs["sample"], inputs["history"])


def test_sessions_are_timed_in_turn_after_a_warm_up() -> None:
    log: list[str] = []
    sessions: Any = {("a", "float"): Sleeper("f", 0.02, log), ("a", "int8"): Sleeper("i", 0.005, log)}
    rows = measure_speed(sessions, MODEL, (2, 4), runs=3)
    # One that prepares and one that tells what a step takes, each; then turns of two and three that count
    assert "".join(log) == ("fifi" + "f" * 5 + "i" * 5) * 2
    assert [(row.backend, row.precision, row.batch, row.runs) for row in rows] == [
        ("a", "float", 2, 3), ("a", "int8", 2, 3), ("a", "float", 4, 3), ("a", "int8", 4, 3),
    ]  # fmt: skip
    assert rows[0].median_ms >= 20
    assert rows[1].median_ms >= 5
    assert rows[1].p95_ms >= rows[1].median_ms


def test_long_measurements_take_several_turns() -> None:
    log: list[str] = []
    sessions: Any = {"a": Sleeper("a", 0.0, log), "b": Sleeper("b", 0.0, log)}
    times = timed_in_turn(sessions, {"sample": None, "history": None}, runs=7)  # type: ignore[dict-item]
    assert "".join(log) == "abab" + "a" * 7 + "b" * 7 + "a" * 4 + "b" * 4
    assert len(log) == 2 * runs_in_all(7)
    assert [len(values) for values in times.values()] == [7, 7]


def test_slow_sessions_are_timed_as_often_as_the_time_allows() -> None:
    log: list[str] = []
    advanced: list[int] = []
    sessions: Any = {"a": Sleeper("a", 0.03, log), "b": Sleeper("b", 0.01, log)}
    inputs: Any = {"sample": None, "history": None}
    times = timed_in_turn(sessions, inputs, runs=10, seconds=0.15, advance=advanced.append)
    assert "".join(log) in ("ab" + "ab" * count for count in (2, 3))  # 0.04 s a round, a little more on a busy machine
    assert len(times["a"]) == len(times["b"]) == len(log) // 2 - 1
    assert min(times["a"]) >= 30
    assert sum(advanced) == 2 * runs_in_all(10)
    assert len(timed_in_turn(sessions, inputs, runs=10, seconds=0.0)["a"]) == 1


def test_a_batch_size_that_would_take_too_long_is_left_out() -> None:
    class PerRow(Sleeper):
        def run(self, inputs: Any) -> StepOutput:
            time.sleep(0.01 * len(inputs["sample"]))
            return StepOutput(inputs["sample"], inputs["sample"], inputs["history"])

    session: Any = {("a", "int8"): PerRow("a", 0.0, [])}
    rows = measure_speed(session, MODEL, (2, 4, 64), runs=2, seconds=0.4)
    assert [row.batch for row in rows] == [2, 4]  # 64 rows would take 1.3 s, twice
    assert [row.batch for row in measure_speed(session, MODEL, (4, 64), runs=2, seconds=0.0)] == [4]


def test_the_speed_up_is_float_over_int8_on_one_backend_and_batch() -> None:
    def row(backend: str, precision: Any, batch: int, median: float) -> SpeedRow:
        return SpeedRow(backend=backend, precision=precision, batch=batch, median_ms=median, p95_ms=99.0, runs=1)

    rows = [row("a", "float", 4, 30.0), row("a", "int8", 4, 10.0), row("a", "float", 8, 80.0), row("b", "int8", 4, 1.0)]
    assert speedup_of(rows, "a", 4) == pytest.approx(3.0)
    assert speedup_of(rows, "a", 8) is None
    assert speedup_of(rows, "b", 4) is None
    assert speedup_of(rows, "c", 4) is None


def test_random_inputs_are_valid_and_repeatable() -> None:
    inputs = random_inputs(MODEL, 6, seed=3)
    assert {name: (value.dtype.name, value.shape) for name, value in inputs.items()} == {
        "sample": ("float32", (6, 1, 2, 2)),
        "timestep": ("int64", (6,)),
        "coefficients": ("float32", (6, 15)),
        "noise": ("float32", (6, 1, 2, 2)),
        "history": ("float32", (6, 3, 2, 2)),
        "class_labels": ("int64", (6,)),
        "text_embeds": ("float32", (6, 5, 4)),
        "guidance": ("float32", (6,)),
        "unconditional_row": ("int64", (6,)),
        "owner_row": ("int64", (6,)),
    }
    assert 0 <= inputs["class_labels"].min() <= inputs["class_labels"].max() < 3
    again, other = random_inputs(MODEL, 6, seed=3), random_inputs(MODEL, 6, seed=4)
    for name, value in inputs.items():
        np.testing.assert_array_equal(value, again[name])
    assert not np.array_equal(inputs["sample"], other["sample"])
