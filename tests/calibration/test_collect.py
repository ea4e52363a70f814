"""A stored row is what the full-precision sampler met: its seed recomputes it, it leads to its image."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from qdm_calibration.collect import collect_calibration_set
from qdm_calibration.timesteps import SamplingPlan
from qdm_deploy.artifacts.calibration_set import CalibrationSet
from qdm_deploy.artifacts.pipeline_spec import Denoiser
from qdm_deploy.artifacts.record import write_record
from qdm_deploy.artifacts.step_interface import StepInterface, TensorSpec
from qdm_deploy.errors import CalibrationError, InputError
from qdm_deploy.progress import Progress
from qdm_deploy.samplers import StepTable, apply_step, initial_noise, step_noise
from qdm_deploy.samplers.conditioning import Conditioning
from qdm_deploy.samplers.sampling import Sampling

Array = NDArray[Any]
SAMPLES = 4
PLAN = SamplingPlan(samples=SAMPLES, steps=4)


def predicted(network: Any, x: Array, timestep: int, conditioning: dict[str, Array]) -> Array:
    with torch.inference_mode():
        given = {name: torch.from_numpy(value) for name, value in conditioning.items()}
        output: Array = network(torch.from_numpy(x), torch.full((len(x),), timestep), **given).numpy()
    return output


def run(
    network: Any, table: StepTable, seeds: list[int], x: Array, first_step: int, conditioning: dict[str, Array],
    *, null: int | None = None, guidance: float = 1.0,
) -> dict[int, tuple[Array, Array]]:  # fmt: skip
    """The sampler written out: (x, history) before every step from ``first_step`` on, and at the end."""
    history = np.repeat(np.zeros_like(x), 3, axis=1)
    met = {first_step: (x, history)}
    for step in range(first_step, len(table.timesteps)):
        t = int(table.timesteps[step])
        output = predicted(network, x, t, conditioning)
        if null is not None:
            free = predicted(network, x, t, {"class_labels": np.full(len(x), null)})
            output = free + np.float32(guidance) * (output - free)
        rows = np.repeat(table.coefficients[step : step + 1], len(x), axis=0)
        x, _, history = apply_step(rows, x, output, history, step_noise(seeds, step, x.shape[1:]))
        met[step + 1] = (x, history)
    return met


def collect(
    tiny: Any,
    name: str,
    plan: SamplingPlan = PLAN,
    guidance: float = 1.0,
    conditioning: Conditioning | None = None,
    **arguments: Any,
) -> CalibrationSet:
    checkpoint = tiny.checkpoint(name)
    sampling = Sampling(
        tiny.table(name), range(11, 11 + SAMPLES), conditioning or tiny.conditioning(name), guidance=guidance
    )
    return collect_calibration_set(checkpoint.unet, checkpoint.denoiser, sampling, plan, **arguments)


@pytest.mark.parametrize("name", ["labels", "rgb", "variance"])
def test_every_row_is_on_the_trajectory_of_its_seed_and_leads_to_its_image(tiny: Any, name: str) -> None:
    network, table, shape = tiny.checkpoint(name).unet, tiny.table(name), tiny.checkpoint(name).spec.sample_shape
    stored = collect(tiny, name)
    seeds = [11, 12, 13, 14]
    conditioning = dict(tiny.conditioning(name).own)
    whole = run(network, table, seeds, initial_noise(seeds, shape), 0, conditioning)
    assert np.unique(stored.step).tolist() == [0, 3, 6, 9, 11]
    for step in np.unique(stored.step):
        rows = np.flatnonzero(stored.step == step)
        assert stored.seed[rows].tolist() == seeds
        assert set(stored.timestep[rows]) == {table.timesteps[step]}
        np.testing.assert_array_equal(stored.sample[rows], whole[int(step)][0])
        own = {key: value[rows] for key, value in stored.conditioning.items()}
        rest = run(network, table, seeds, stored.sample[rows], int(step), own)
        np.testing.assert_array_equal(rest[len(table.timesteps)][0], whole[len(table.timesteps)][0])


def test_the_guided_trajectory_is_kept_with_its_unconditional_twins(tiny: Any) -> None:
    stored = collect(tiny, "labels", guidance=3.0)
    table, seeds = tiny.table("labels"), [11, 12, 13, 14]
    labels, null = np.arange(SAMPLES) % 3, 3
    start = initial_noise(seeds, (1, 10, 10))
    whole = run(
        tiny.checkpoint("labels").unet, table, seeds, start, 0, {"class_labels": labels}, null=null, guidance=3.0
    )
    for step in np.unique(stored.step):
        rows = np.flatnonzero(stored.step == step)
        assert stored.seed[rows].tolist() == seeds * 2
        assert stored.conditioning["class_labels"][rows].tolist() == [*labels, null, null, null, null]
        np.testing.assert_array_equal(stored.sample[rows[:SAMPLES]], stored.sample[rows[SAMPLES:]])
        np.testing.assert_array_equal(stored.sample[rows[:SAMPLES]], whole[int(step)][0])
    plain = collect(tiny, "labels")
    assert len(plain) == len(stored) // 2
    assert (plain.sample[-SAMPLES:] != stored.sample[-SAMPLES:]).any()


def test_the_batch_size_changes_neither_the_rows_nor_their_order(tiny: Any) -> None:
    whole, split = collect(tiny, "rgb"), collect(tiny, "rgb", batch_size=3)
    for field in ("seed", "step", "timestep"):
        np.testing.assert_array_equal(getattr(whole, field), getattr(split, field))
    np.testing.assert_allclose(whole.sample, split.sample, rtol=0, atol=1e-4)  # kernels may sum in another order


def test_ndtc_rows_are_on_the_trajectory_too(tiny: Any) -> None:
    plan = SamplingPlan(strategy="ndtc", samples=SAMPLES, count=30)
    stored = collect(tiny, "rgb", plan=plan)
    assert len(stored) == 30
    seeds = [11, 12, 13, 14]
    whole = run(tiny.checkpoint("rgb").unet, tiny.table("rgb"), seeds, initial_noise(seeds, (3, 8, 12)), 0, {})
    for row in range(30):
        np.testing.assert_array_equal(stored.sample[row], whole[int(stored.step[row])][0][stored.seed[row] - 11])
    assert stored.provenance["strategy"] == "ndtc"


def test_text_conditioning_goes_with_its_rows(tiny: Any) -> None:
    states = np.random.default_rng(1).normal(size=(4, 77, 16)).astype(np.float32)
    empty = np.zeros((77, 16), dtype=np.float32)
    given = Conditioning({"encoder_hidden_states": states}, {"encoder_hidden_states": empty[None]})
    stored = collect(tiny, "text", guidance=2.0, conditioning=given, plan=SamplingPlan(samples=4, steps=2))
    rows = np.flatnonzero(stored.step == 0)
    expected = np.concatenate([states, np.zeros((4, 77, 16), dtype=np.float32)])
    np.testing.assert_array_equal(stored.conditioning["encoder_hidden_states"][rows], expected)


def test_provenance_says_how_the_set_was_made(tiny: Any) -> None:
    stored = collect(tiny, "labels", guidance=1.5, provenance={"model": "tiny"})
    assert stored.provenance == {
        "model": "tiny", "sampler": "ddpm", "steps": 12, "strategy": "uniform", "samples": 4,
        "seed": 11, "guidance": 1.5,
    }  # fmt: skip


def test_progress_counts_every_forward_pass_once(tiny: Any) -> None:
    seen: list[int] = []

    class Counting:
        def task(self, description: str, total: int | None) -> Any:
            from contextlib import nullcontext

            seen.append(-(total or 0))
            return nullcontext(lambda steps=1: seen.append(steps))

        def say(self, message: str) -> None: ...

    progress: Progress = Counting()
    collect(tiny, "rgb", batch_size=3, progress=progress)
    assert sum(seen) == 0
    assert seen[0] == -2 * 12


PLAIN = Denoiser(interface=StepInterface.of((1, 2, 2), coefficients=13), num_train_timesteps=1000)
# x stays as it is: a is 1, and so is clip.
TWO_STEPS = StepTable("ddim", np.array([500, 0]), np.array([[1, 0, 1, 1, *[0] * 9]] * 2, dtype=np.float32))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_network_that_diverges_is_refused(value: float) -> None:
    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.where(t.reshape(-1, 1, 1, 1) == 0, value, x)

    with pytest.raises(CalibrationError, match="NaN or infinity at timestep 0;"):
        collect_calibration_set(network, PLAIN, Sampling(TWO_STEPS, [0, 1]), SamplingPlan(samples=2, steps=2))


def test_a_timestep_between_two_reaches_the_network_and_counts_as_the_lower_one() -> None:
    seen: list[float] = []

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append(float(t[0]))
        return x

    between = StepTable("between", np.array([500.5, 0.0]), TWO_STEPS.coefficients.copy())
    interface = StepInterface.of((1, 2, 2), coefficients=13, fractional_timesteps=True)
    denoiser = Denoiser(interface=interface, num_train_timesteps=1000)
    stored = collect_calibration_set(network, denoiser, Sampling(between, [0, 1]), SamplingPlan(samples=2, steps=2))
    assert seen == [500.5, 0.0]
    assert stored.timestep.tolist() == [500, 500, 0, 0]


def test_conditions_of_any_name_go_with_their_rows() -> None:
    spec = TensorSpec(name="text_embeds", row_shape=(3,))
    denoiser = Denoiser(interface=StepInterface.of((1, 2, 2), [spec], coefficients=13), num_train_timesteps=1000)
    own, null = np.arange(6, dtype=np.float32).reshape(2, 3), np.full((1, 3), -1, np.float32)
    sampling = Sampling(TWO_STEPS, [0, 1], Conditioning({"text_embeds": own}, {"text_embeds": null}), guidance=2.0)
    stored = collect_calibration_set(lambda x, t, **_: x, denoiser, sampling, SamplingPlan(samples=2, steps=2))
    expected = np.concatenate([own, null, null])
    np.testing.assert_array_equal(stored.conditioning["text_embeds"], np.concatenate([expected, expected]))


def test_what_does_not_fit_the_model_is_refused() -> None:
    with pytest.raises(InputError, match="the model is unconditional, so there is nothing to guide"):
        collect_calibration_set(
            lambda x, t, **_: x, PLAIN, Sampling(TWO_STEPS, [0], guidance=2.0), SamplingPlan(samples=1, steps=2)
        )


# ------------------------------------------------------------------------------------------------------ the saved value


def rows(**changes: Any) -> CalibrationSet:
    values = {
        "sample": np.arange(8, dtype=np.float32).reshape(2, 1, 2, 2), "timestep": np.array([5, 3]),
        "seed": np.array([0, 1]), "step": np.array([0, 1]), "conditioning": {"class_labels": np.array([1, 2])},
        "provenance": {"model": "toy"},
    }  # fmt: skip
    return CalibrationSet(**{**values, **changes})


def test_save_and_load_keep_every_bit(tiny: Any, tmp_path: Path) -> None:
    stored = tiny.calibration("labels")
    stored.save(tmp_path / "set.safetensors")
    loaded = CalibrationSet.load(tmp_path / "set.safetensors")
    for field in ("sample", "timestep", "seed", "step"):
        np.testing.assert_array_equal(getattr(loaded, field), getattr(stored, field))
        assert getattr(loaded, field).dtype == getattr(stored, field).dtype
    assert loaded.conditioning.keys() == {"class_labels"}
    np.testing.assert_array_equal(loaded.conditioning["class_labels"], stored.conditioning["class_labels"])
    assert loaded.provenance == stored.provenance


def test_an_empty_set_is_refused() -> None:
    with pytest.raises(CalibrationError, match="the calibration set is empty"):
        rows(sample=np.zeros((0, 1, 2, 2), dtype=np.float32))


@pytest.mark.parametrize("field", ["timestep", "seed", "step"])
def test_a_set_of_uneven_columns_is_refused(field: str) -> None:
    with pytest.raises(CalibrationError, match=f"has 2 samples but 3 values of {field}"):
        rows(**{field: np.arange(3)})


def test_conditioning_of_uneven_length_is_refused() -> None:
    with pytest.raises(CalibrationError, match="2 samples but 1 values of class_labels"):
        rows(conditioning={"class_labels": np.array([1])})


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_sample_with_nan_is_refused(value: float) -> None:
    sample = np.zeros((2, 1, 2, 2), dtype=np.float32)
    sample[1, 0, 1, 0] = value
    with pytest.raises(
        CalibrationError, match=r"1 of 2 calibration samples hold NaN or infinity \(first: row 1, timestep 3\)"
    ):
        rows(sample=sample)


def test_a_record_without_its_arrays_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    arrays = {"sample": np.zeros((1, 1, 2, 2), dtype=np.float32), "timestep": np.array([1])}
    write_record(path, kind="qdm-calibration-set", version=1, document={"provenance": {}}, arrays=arrays)
    with pytest.raises(
        CalibrationError, match=r"half\.safetensors is not a whole calibration set: it lacks seed, step"
    ):
        CalibrationSet.load(path)


def test_a_record_without_provenance_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    whole = rows()
    arrays = {name: getattr(whole, name) for name in ("sample", "timestep", "seed", "step")}
    write_record(path, kind="qdm-calibration-set", version=1, document={}, arrays=arrays)
    with pytest.raises(CalibrationError, match="it lacks its provenance"):
        CalibrationSet.load(path)


def test_statistics_are_not_taken_for_a_calibration_set(tiny: Any, tmp_path: Path) -> None:
    tiny.statistics("variance").save(tmp_path / "s.safetensors")
    with pytest.raises(InputError, match="qdm-activation-statistics"):
        CalibrationSet.load(tmp_path / "s.safetensors")


def test_a_set_is_frozen() -> None:
    with pytest.raises(AttributeError):
        rows().step = np.array([1, 1])  # type: ignore[misc]
    assert replace(rows(), provenance={}).provenance == {}
