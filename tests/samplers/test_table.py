"""The table itself: values that can be derived by hand, bounds, and every refusal."""

from typing import Any

import diffusers
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qdm_deploy.errors import InputError
from qdm_deploy.samplers import SAMPLERS, NoiseSchedule, step_table

# sqrt of these levels: 0.96, 0.8, 0.6; sqrt of one minus them: 0.28, 0.6, 0.8.
LEVELS = [0.9216, 0.64, 0.36]


def schedule_with(**options: Any) -> NoiseSchedule:
    return NoiseSchedule(alphas_cumprod=np.array(LEVELS), **options)


def config(name: str = "DDIMScheduler", **options: object) -> NoiseSchedule:
    return NoiseSchedule.from_config({"_class_name": name, **options})


def test_ddim_rows_by_hand() -> None:
    table = step_table(schedule_with(clip_sample=True, clip_sample_range=2.0), "ddim", 3)
    assert table.sampler == "ddim"
    assert table.steps == 3
    assert table.timesteps.tolist() == [2, 1, 0]
    expected = [
        [1 / 0.6, -0.8 / 0.6, 2.0, 0.6 / 0.8, 0.8 - 0.6 * 0.6 / 0.8, 0.0, 0.0],
        [1 / 0.8, -0.6 / 0.8, 2.0, 0.28 / 0.6, 0.96 - 0.8 * 0.28 / 0.6, 0.0, 0.0],
        [1 / 0.96, -0.28 / 0.96, 2.0, 0.0, 1.0, 0.0, 0.0],
    ]
    np.testing.assert_allclose(table.coefficients, expected, rtol=1e-6)


def test_ddpm_row_by_hand() -> None:
    row = step_table(schedule_with(prediction_type="v_prediction"), "ddpm", 3).coefficients[0]
    alpha = 0.36 / 0.64
    expected = [
        0.6,
        -0.8,
        3.0e38,
        alpha**0.5 * 0.36 / 0.64,
        0.8 * (1 - alpha) / 0.64,
        0.0,
        (0.36 / 0.64 * (1 - alpha)) ** 0.5,
    ]
    np.testing.assert_allclose(row, expected, rtol=1e-6)


def test_ddpm_leaves_out_noise_at_timestep_0_only() -> None:
    whole = step_table(config("DDPMScheduler", variance_type="fixed_large"), "ddpm", 1000).coefficients[:, 6]
    assert np.flatnonzero(whole == 0.0).tolist() == [999]
    # A spacing that ends above timestep 0 keeps the noise of its last step, as in diffusers.
    trailing = config("DDPMScheduler", variance_type="fixed_large", timestep_spacing="trailing")
    assert np.all(step_table(trailing, "ddpm", 50).coefficients[:, 6] > 0.0)


def test_learned_variance_columns_by_hand() -> None:
    schedule = schedule_with(variance_type="learned_range", prediction_type="sample")
    table = step_table(schedule, "ddpm", 3, learned_variance=True)
    alpha = 0.36 / 0.64
    np.testing.assert_allclose(
        table.coefficients[0, 6:], [1.0, np.log(0.36 / 0.64 * (1 - alpha)), np.log(1 - alpha)], rtol=1e-6
    )
    assert table.coefficients[:, :2].tolist() == [[0.0, 1.0]] * 3
    # The last step adds no noise, and its vanishing variance has a finite logarithm.
    np.testing.assert_allclose(table.coefficients[-1, 6:8], [0.0, np.log(1e-20)], rtol=1e-6)


def test_second_order_row_by_hand() -> None:
    # Half-log-SNR of ln 0.5, ln 1, ln 2 ...: equal intervals of ln 2, so 1/(2r) is 0.5.
    levels = np.array([1 / (1 + ratio**-2) for ratio in (4.0, 2.0, 1.0, 0.5)])
    table = step_table(NoiseSchedule(alphas_cumprod=levels, timestep_spacing="trailing"), "dpmpp-2m", 4)
    gain = 0.5 * levels[1] ** 0.5
    np.testing.assert_allclose(
        table.coefficients[1, 3:], [((1 - levels[1]) / (1 - levels[2])) ** 0.5, 1.5 * gain, -0.5 * gain, 0.0], rtol=1e-6
    )
    assert table.coefficients[0, 5] == 0.0
    assert table.coefficients[-1, 3:].tolist() == [0.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("learned_variance", [False, True])
def test_dtypes_shapes_and_read_only(sampler: str, learned_variance: bool) -> None:
    table = step_table(config(), sampler, 20, learned_variance=learned_variance)
    assert table.timesteps.dtype == np.int64
    assert table.coefficients.dtype == np.float32
    assert table.coefficients.shape == (20, 9 if learned_variance else 7)
    for array in (table.timesteps, table.coefficients):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


@settings(max_examples=150, deadline=None)
@given(
    sampler=st.sampled_from(SAMPLERS),
    steps=st.integers(1, 999),
    spacing=st.sampled_from(["leading", "linspace", "trailing"]),
    betas=st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
    prediction=st.sampled_from(["epsilon", "v_prediction", "sample"]),
)
def test_every_table_is_finite_and_falls_through_the_timesteps(
    sampler: str, steps: int, spacing: str, betas: str, prediction: str
) -> None:
    schedule = config(timestep_spacing=spacing, beta_schedule=betas, prediction_type=prediction)
    table = step_table(schedule, sampler, steps)
    assert table.timesteps.shape == (steps,)
    assert np.all(np.diff(table.timesteps) < 0)
    assert 0 <= table.timesteps[-1] <= table.timesteps[0] < 1000
    assert np.all(np.isfinite(table.coefficients))
    assert np.all(table.coefficients[[0, -1], 5] == 0.0)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 1000), st.floats(0.0, 1.0), st.sampled_from(["leading", "linspace", "trailing"]))
def test_ddim_keeps_the_signal_and_the_noise_power(steps: int, eta: float, spacing: str) -> None:
    """x_t = alpha*x0 + sigma*eps with the true x0 arrives with the signal and the noise of the next level."""
    schedule = config(timestep_spacing=spacing)
    table = step_table(schedule, "ddim", steps, eta=eta)
    a, b, d = table.coefficients[:, [3, 4, 6]].astype(np.float64).T
    level = schedule.alphas_cumprod[table.timesteps]
    next_timesteps = table.timesteps - 1000 // steps
    next_level = np.where(next_timesteps >= 0, schedule.alphas_cumprod[next_timesteps], 1.0)
    np.testing.assert_allclose(a * np.sqrt(level) + b, np.sqrt(next_level), atol=1e-6)
    np.testing.assert_allclose(a**2 * (1 - level) + d**2, 1 - next_level, atol=1e-6)


def test_ddim_at_eta_1_is_ddpm_with_the_small_variance() -> None:
    schedule = config()
    np.testing.assert_allclose(
        step_table(schedule, "ddim", 50, eta=1.0).coefficients,
        step_table(schedule, "ddpm", 50).coefficients,
        rtol=2e-6,
        atol=1e-7,
    )


def test_euler_is_unclipped_ddim_at_eta_0() -> None:
    schedule = config(clip_sample=False)
    ddim, euler = (step_table(schedule, sampler, 50).coefficients for sampler in ("ddim", "euler"))
    assert np.array_equal(ddim, euler)


@pytest.mark.parametrize("steps", [61, 103, 998])
def test_trailing_never_leaves_the_timesteps(steps: int) -> None:
    """diffusers lays one timestep too many here, at -1, where its float step falls short."""
    scheduler = diffusers.DDIMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    timesteps = step_table(config(timestep_spacing="trailing"), "ddim", steps).timesteps.tolist()
    assert scheduler.timesteps.tolist() == [*timesteps, -1]


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "euler"])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_all_training_timesteps_can_be_visited(sampler: str, spacing: str) -> None:
    table = step_table(config(timestep_spacing=spacing), sampler, 1000)
    assert table.timesteps.tolist() == list(range(999, -1, -1))


@pytest.mark.parametrize("sampler", ["plms", "DDIM", ""])
def test_an_unknown_sampler_is_refused(sampler: str) -> None:
    with pytest.raises(InputError, match=f"sampler '{sampler}' is unknown; choose one of ddpm, ddim, dpmpp-2m, euler"):
        step_table(config(), sampler, 10)


@pytest.mark.parametrize("steps", [0, -3, 1001])
def test_steps_out_of_range_are_refused(steps: int) -> None:
    with pytest.raises(InputError, match=rf"steps={steps} is out of range.* 1 \.\. 1000"):
        step_table(config(), "ddim", steps)


@pytest.mark.parametrize("eta", [-0.1, 1.5, float("nan")])
def test_eta_out_of_range_is_refused(eta: float) -> None:
    with pytest.raises(InputError, match=f"eta={eta} is out of range"):
        step_table(config(), "ddim", 10, eta=eta)


@pytest.mark.parametrize("sampler", ["ddpm", "dpmpp-2m", "euler"])
def test_eta_of_another_sampler_is_refused(sampler: str) -> None:
    with pytest.raises(InputError, match=f"eta=0.5 was given for sampler '{sampler}'"):
        step_table(config(), sampler, 10, eta=0.5)


@pytest.mark.parametrize("variance_type", ["learned", "fixed_large_log"])
def test_unsupported_variance_types_are_refused_by_ddpm_alone(variance_type: str) -> None:
    schedule = config("DDPMScheduler", variance_type=variance_type)
    assert step_table(schedule, "ddim", 10).steps == 10
    with pytest.raises(InputError, match=f"variance_type='{variance_type}' is not supported by sampler 'ddpm'"):
        step_table(schedule, "ddpm", 10)


def test_learned_range_without_a_learned_variance_is_refused() -> None:
    with pytest.raises(InputError, match="variance_type='learned_range' needs a model with twice as many output"):
        step_table(config("DDPMScheduler", variance_type="learned_range"), "ddpm", 10)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_predicted_noise_at_zero_signal_is_refused(sampler: str) -> None:
    schedule = config(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    with pytest.raises(InputError, match="prediction_type='epsilon' with rescale_betas_zero_snr=True"):
        step_table(schedule, sampler, 10)
    assert np.all(np.isfinite(step_table(schedule, "euler", 10).coefficients))


def test_an_offset_beyond_the_last_timestep_is_refused() -> None:
    with pytest.raises(InputError, match="1000 steps with steps_offset=1 start at timestep 1000, but the last"):
        step_table(config(steps_offset=1), "ddim", 1000)


@pytest.mark.parametrize("spacing", ["leading", "linspace"])
def test_a_repeated_timestep_is_refused(spacing: str) -> None:
    with pytest.raises(InputError, match=f"1000 steps with '{spacing}' spacing visit a timestep twice"):
        step_table(config(timestep_spacing=spacing), "dpmpp-2m", 1000)


@pytest.mark.parametrize(
    ("key", "value", "samplers"),
    [
        ("use_karras_sigmas", True, ["dpmpp-2m", "euler"]),
        ("use_exponential_sigmas", True, ["dpmpp-2m", "euler"]),
        ("use_beta_sigmas", True, ["dpmpp-2m", "euler"]),
        ("final_sigmas_type", "sigma_min", ["dpmpp-2m", "euler"]),
        ("algorithm_type", "sde-dpmsolver++", ["dpmpp-2m"]),
        ("solver_order", 3, ["dpmpp-2m"]),
        ("solver_type", "heun", ["dpmpp-2m"]),
        ("lambda_min_clipped", -5.1, ["dpmpp-2m"]),
        ("use_lu_lambdas", True, ["dpmpp-2m"]),
        ("use_flow_sigmas", True, ["dpmpp-2m"]),
        ("interpolation_type", "log_linear", ["euler"]),
        ("timestep_type", "continuous", ["euler"]),
    ],
)
def test_solver_options_are_refused_by_the_samplers_they_mean_something_to(
    key: str, value: object, samplers: list[str]
) -> None:
    schedule = config("DPMSolverMultistepScheduler", **{key: value})
    for sampler in SAMPLERS:
        if sampler in samplers:
            with pytest.raises(
                InputError, match=f"has {key}={value!r}, which sampler '{sampler}' does".replace("+", r"\+")
            ):
                step_table(schedule, sampler, 10)
        else:
            assert step_table(schedule, sampler, 10).steps == 10
