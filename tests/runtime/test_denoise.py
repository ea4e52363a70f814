from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qdm_deploy.backends.onnxruntime.session import OnnxRuntimeSession
from qdm_deploy.errors import CheckFailed, InputError
from qdm_deploy.progress import Advance
from qdm_deploy.runtime.denoise import denoise
from qdm_deploy.runtime.session import StepOutput
from qdm_deploy.samplers import column
from qdm_deploy.samplers.conditioning import Conditioning
from qdm_deploy.samplers.noise import initial_noise, step_noise
from qdm_deploy.samplers.sampling import Sampling
from qdm_deploy.samplers.table import StepTable

SEEDS = [11, 4, 2**63 - 1, 7, 7, 0, 123456789]
LABELS = np.array([0, 1, 2, 3, 3, 4, 5])


class Recording(OnnxRuntimeSession):
    """The real session, keeping a copy of every input it was given."""

    def __init__(self, graph: Path) -> None:
        super().__init__(graph, threads=1)
        self.seen: list[dict[str, Any]] = []

    def run(self, inputs: Any) -> StepOutput:
        self.seen.append({name: value.copy() for name, value in inputs.items()})
        return super().run(inputs)


class FiveRows(Recording):
    max_batch = 5


class OneRow(Recording):
    max_batch = 1


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp-2m", "dpmpp-2m-sde", "pndm", "unipc", "euler-a"])
def test_whole_run_is_the_closed_form(open_on: Any, plain: Any, make_table: Any, sampler: str) -> None:
    table = make_table(sampler, 6, eta=0.7 if sampler == "ddim" else None)
    with open_on(plain.graph) as session:
        result = denoise(session, plain.sampling(table, SEEDS), batch_size=3)
    expected = plain.run(
        table,
        initial_noise(SEEDS, plain.spec.sample_shape) * np.float32(table.initial_scale),
        lambda step: step_noise(SEEDS, step, plain.spec.sample_shape),
    )
    assert result.dtype == np.float32
    assert result.std() > 0.1
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=2e-5)


def test_learned_variance_is_the_closed_form(open_on: Any, learned: Any, make_table: Any) -> None:
    table = make_table("ddpm", 5, learned_variance=True)
    assert table.coefficients.shape == (5, 15)
    with open_on(learned.graph) as session:
        result = denoise(session, learned.sampling(table, SEEDS), batch_size=4)
    shape = learned.spec.sample_shape
    expected = learned.run(table, initial_noise(SEEDS, shape), lambda step: step_noise(SEEDS, step, shape))
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("guidance", [1.0, 0.0, 4.5])
def test_labels_and_guidance_are_the_closed_form(open_on: Any, labelled: Any, make_table: Any, guidance: float) -> None:
    table = make_table("ddpm", 5)
    with open_on(labelled.graph) as session:
        result = denoise(session, labelled.sampling(table, SEEDS, LABELS, guidance=guidance), batch_size=3)
    shape = labelled.spec.sample_shape
    expected = labelled.run(
        table, initial_noise(SEEDS, shape), lambda step: step_noise(SEEDS, step, shape), LABELS, guidance
    )
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=2e-5)


def test_guided_and_unguided_samples_share_a_batch(open_on: Any, labelled: Any) -> None:
    # Rows 0 and 1: a guided sample and its twin; row 2: an unguided one.
    rng = np.random.default_rng(0)
    shape = labelled.spec.sample_shape
    sample = rng.standard_normal((3, *shape), dtype=np.float32)
    sample[1] = sample[0]
    inputs = {
        "sample": sample,
        "timestep": np.array([70, 70, 20]),
        "coefficients": np.tile(np.array([0, 1, 3.0e38, 0, 1, *[0] * 8], np.float32), (3, 1)),
        "noise": np.zeros((3, *shape), np.float32),
        "history": np.zeros((3, 3 * shape[0], *shape[1:]), np.float32),
        "class_labels": np.array([2, 5, 4]),
        "guidance": np.array([3.0, 3.0, 1.0], np.float32),
        "unconditional_row": np.array([1, 1, 2]),
        "owner_row": np.array([0, 0, 2]),
    }
    with open_on(labelled.graph) as session:
        x0 = session.run(inputs).x0.copy()
    own = labelled.network(sample[:1], 70, np.array([2]))
    free = labelled.network(sample[:1], 70, np.array([5]))
    np.testing.assert_allclose(x0[0], (free + 3 * (own - free))[0], atol=1e-5)
    np.testing.assert_array_equal(x0[1], x0[0])
    np.testing.assert_allclose(x0[2], labelled.network(sample[2:], 20, np.array([4]))[0], atol=1e-5)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_a_sample_does_not_depend_on_its_batch(open_on: Any, labelled: Any, make_table: Any, guidance: float) -> None:
    table = make_table("ddpm", 4)
    seeds, labels = list(range(16)), np.arange(16) % 6
    order = np.random.default_rng(3).permutation(16)

    def run(chosen: Any, batch_size: int) -> Any:
        chosen_seeds = [seeds[index] for index in chosen]
        sampling = labelled.sampling(table, chosen_seeds, labels[chosen], guidance=guidance)
        return denoise(session, sampling, batch_size=batch_size)

    with open_on(labelled.graph) as session:
        together = run(np.arange(16), 16)
        alone = [run(np.arange(16), size) for size in (1, 3)]
        permuted = run(order, 5)
        exact = session.describe()["backend"] == "onnxruntime"
    for other in (*alone, permuted[np.argsort(order)]):
        if exact:
            np.testing.assert_array_equal(other, together)
        else:
            # OpenVINO compiles each batch size on its own and may sum in another order.
            np.testing.assert_allclose(other, together, atol=1e-6)


def test_equal_seeds_give_equal_samples_and_others_differ(plain: Any, make_table: Any) -> None:
    with OnnxRuntimeSession(plain.graph) as session:
        result = denoise(session, plain.sampling(make_table("ddpm", 4), [7, 8, 7]))
    np.testing.assert_array_equal(result[0], result[2])
    assert np.abs(result[0] - result[1]).max() > 0.1


def test_noise_is_made_only_for_steps_that_use_it(plain: Any, make_table: Any) -> None:
    for table in (make_table("ddim", 4), make_table("ddpm", 4)):
        with Recording(plain.graph) as session:
            denoise(session, plain.sampling(table, [1, 2]))
        for step, inputs in enumerate(session.seen):
            if table.coefficients[step, column("d")] != 0:
                np.testing.assert_array_equal(inputs["noise"], step_noise([1, 2], step, plain.spec.sample_shape))
            else:
                before = session.seen[step - 1]["noise"] if step else np.zeros_like(inputs["noise"])
                np.testing.assert_array_equal(inputs["noise"], before)
    assert table.coefficients[0, column("d")] != 0
    assert table.coefficients[-1, column("d")] == 0


def test_on_step_sees_all_samples_after_each_step(plain: Any, make_table: Any) -> None:
    table = make_table("ddpm", 5)
    seen: list[tuple[int, Any]] = []
    with OnnxRuntimeSession(plain.graph) as session:
        result = denoise(
            session, plain.sampling(table, SEEDS), batch_size=3, on_step=lambda step, x: seen.append((step, x))
        )
    assert [step for step, _ in seen] == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(seen[-1][1], result)
    shape = plain.spec.sample_shape
    for stop, sample in seen:
        head = StepTable("head", table.timesteps[: stop + 1], table.coefficients[: stop + 1])
        expected = plain.run(head, initial_noise(SEEDS, shape), lambda step: step_noise(SEEDS, step, shape))
        np.testing.assert_allclose(sample, expected, rtol=1e-5, atol=2e-5)


def test_on_step_of_a_guided_run_sees_one_row_per_sample(labelled: Any, make_table: Any) -> None:
    seen: list[Any] = []
    with Recording(labelled.graph) as session:
        result = denoise(
            session,
            labelled.sampling(make_table("ddpm", 3), SEEDS, LABELS, guidance=2.0),
            batch_size=4,
            on_step=lambda _, x: seen.append(x),
        )
    assert [x.shape for x in seen] == [result.shape] * 3 == [(7, 3, 4, 4)] * 3
    assert [inputs["sample"].shape[0] for inputs in session.seen] == [8, 6] * 3
    assert session.seen[1]["class_labels"].tolist() == [3, 5, 4, 5, 5, 5]
    assert session.seen[1]["owner_row"].tolist() == [0, 0, 2, 2, 4, 4]
    assert session.seen[1]["unconditional_row"].tolist() == [1, 1, 3, 3, 5, 5]
    for inputs in session.seen:
        np.testing.assert_array_equal(inputs["sample"][0::2], inputs["sample"][1::2])


def test_max_batch_of_the_session_limits_the_rows(labelled: Any, make_table: Any) -> None:
    for guidance, rows in ((1.0, [5, 2]), (2.0, [4, 4, 4, 2])):
        with FiveRows(labelled.graph) as session:
            denoise(session, labelled.sampling(make_table("ddim", 1), SEEDS, LABELS, guidance=guidance))
        assert [len(inputs["sample"]) for inputs in session.seen] == rows


def test_progress_counts_runs(plain: Any, make_table: Any) -> None:
    class Counter:
        total: int | None = None
        done = 0

        @contextmanager
        def task(self, description: str, total: int | None) -> Iterator[Advance]:
            self.total = total

            def advance(steps: int = 1) -> None:
                self.done += steps

            yield advance

        def say(self, message: str) -> None:
            raise AssertionError(message)

    counter = Counter()
    with OnnxRuntimeSession(plain.graph) as session:
        denoise(session, plain.sampling(make_table("ddim", 4), SEEDS), batch_size=3, progress=counter)
    assert (counter.total, counter.done) == (12, 12)


ONE = {"class_labels": np.array([1])}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": []}, "no seeds were given"),
        ({"seeds": [-1]}, "seed -1 is out of range"),
        ({"batch_size": 0}, "the batch size is 0"),
        ({"guidance": float("nan")}, "guidance scale is nan"),
        ({"guidance": 2.0}, "the model is unconditional, so there is nothing to guide"),
        ({"guidance_rescale": 0.5}, "guidance cannot be rescaled"),
        ({"conditioning": Conditioning(ONE)}, "the model is conditioned on nothing; given: class_labels"),
        ({"initial": np.zeros((1, 3, 4, 5), np.float32)}, r"initial has the shape \[1, 3, 4, 5\]"),
    ],
)
def test_wrong_arguments_are_refused(plain: Any, make_table: Any, change: dict[str, Any], message: str) -> None:
    arguments = {"seeds": [1], "batch_size": 4, **change}
    size = arguments.pop("batch_size")
    with OnnxRuntimeSession(plain.graph) as session, pytest.raises(InputError, match=message):
        denoise(session, Sampling(make_table("ddim", 2), **arguments), batch_size=size)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({}, "the model is conditioned on class_labels; given: nothing"),
        ({"class_labels": np.arange(3)}, r"class_labels is int64 \[3\]; 2 images need int64 \[2\], or one row"),
        ({"class_labels": np.array([1.0, 2.0])}, r"class_labels is float64 \[2\]; 2 images need int64"),
    ],
)
def test_wrong_conditioning_is_refused(labelled: Any, make_table: Any, own: Any, message: str) -> None:
    sampling = Sampling(make_table("ddim", 2), [1, 2], Conditioning(own))
    with OnnxRuntimeSession(labelled.graph) as session, pytest.raises(InputError, match=message):
        denoise(session, sampling)


def test_guidance_needs_an_unconditional_twin(labelled: Any, make_table: Any) -> None:
    sampling = Sampling(make_table("ddim", 2), [1], Conditioning(ONE), guidance=2.0)
    message = "guidance needs what the model sees where nothing is asked for"
    with OnnxRuntimeSession(labelled.graph) as session, pytest.raises(InputError, match=message):
        denoise(session, sampling)


def test_guidance_needs_two_rows(labelled: Any, make_table: Any) -> None:
    with OneRow(labelled.graph) as session, pytest.raises(InputError, match="runs one row at a time"):
        denoise(session, labelled.sampling(make_table("ddim", 2), [1], [1], guidance=2.0))


def test_the_table_must_be_the_sessions(plain: Any, learned: Any, make_table: Any) -> None:
    with (
        OnnxRuntimeSession(learned.graph) as session,
        pytest.raises(InputError, match=r"13 coefficients a step and the step graph takes 15.*learned_variance=True"),
    ):
        denoise(session, learned.sampling(make_table("ddim", 2), [1]))
    between = StepTable("between", np.array([50.5, 0.0]), make_table("ddim", 2).coefficients.copy())
    message = "'between' has timesteps between whole ones"
    with OnnxRuntimeSession(plain.graph) as session, pytest.raises(InputError, match=message):
        denoise(session, plain.sampling(between, [1]))


def test_broken_numbers_are_not_returned(plain: Any, make_table: Any) -> None:
    table = make_table("ddim", 2)
    coefficients = table.coefficients.copy()
    coefficients[1, column("a")] = np.inf
    broken = StepTable("broken", table.timesteps, coefficients)
    message = r"2 of 2 samples became NaN or infinite \(first seed: 9\) on the backend onnxruntime"
    with OnnxRuntimeSession(plain.graph) as session, pytest.raises(CheckFailed, match=message):
        denoise(session, plain.sampling(broken, [9, 3]))
