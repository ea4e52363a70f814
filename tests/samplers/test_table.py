"""The table itself: values that can be derived by hand, bounds, and every refusal."""

from typing import Any

import diffusers
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qdm_deploy.errors import InputError
from qdm_deploy.samplers import (
    NO_CLIP,
    SAMPLERS,
    NoiseSchedule,
    StepTable,
    column,
    first_step_of_strength,
    step_table,
)

# sqrt of these levels: 0.96, 0.8, 0.6; sqrt of one minus them: 0.28, 0.6, 0.8.
LEVELS = [0.9216, 0.64, 0.36]


def schedule_with(**options: Any) -> NoiseSchedule:
    return NoiseSchedule(alphas_cumprod=np.array(LEVELS), **options)


def config(name: str = "DDIMScheduler", **options: object) -> NoiseSchedule:
    return NoiseSchedule.from_config({"_class_name": name, **options})


def of(table: StepTable, *names: str) -> Any:
    """Named columns of a table, [S, names]."""
    return table.coefficients[:, [column(name) for name in names]].astype(np.float64)


def test_ddim_rows_by_hand() -> None:
    table = step_table(schedule_with(clip_sample=True, clip_sample_range=2.0), "ddim", 3)
    assert table.sampler == "ddim"
    assert (table.steps, table.initial_scale) == (3, 1.0)
    assert table.timesteps.tolist() == [2, 1, 0]
    expected = [
        [1 / 0.6, -0.8 / 0.6, 2.0, 0.0, 0.8, 0.6],
        [1 / 0.8, -0.6 / 0.8, 2.0, 0.0, 0.96, 0.28],
        [1 / 0.96, -0.28 / 0.96, 2.0, 0.0, 1.0, 0.0],
    ]
    np.testing.assert_allclose(of(table, "p", "q", "clip", "a", "b", "g"), expected, rtol=1e-6)
    assert not of(table, "c0", "c1", "c2", "d", "v", "w").any()
    assert of(table, "u").ravel().tolist() == [1.0] * 3
    np.testing.assert_allclose(np.stack([table.signal, table.noise]), [[0.6, 0.8, 0.96], [0.8, 0.6, 0.28]])


def test_ddim_rows_with_the_clipped_output_by_hand() -> None:
    schedule = schedule_with(clip_sample=True, clip_sample_range=2.0)
    table = step_table(schedule, "ddim", 3, use_clipped_model_output=True)
    expected = [[0.6 / 0.8, 0.8 - 0.6 * 0.6 / 0.8], [0.28 / 0.6, 0.96 - 0.8 * 0.28 / 0.6], [0.0, 1.0]]
    np.testing.assert_allclose(of(table, "a", "b"), expected, rtol=1e-6)
    assert not of(table, "g").any()


def test_ddpm_row_by_hand() -> None:
    table = step_table(schedule_with(prediction_type="v_prediction"), "ddpm", 3)
    alpha = 0.36 / 0.64
    expected = [
        0.6,
        -0.8,
        NO_CLIP,
        alpha**0.5 * 0.36 / 0.64,
        0.8 * (1 - alpha) / 0.64,
        (0.36 / 0.64 * (1 - alpha)) ** 0.5,
    ]
    np.testing.assert_allclose(of(table, "p", "q", "clip", "a", "b", "d")[0], expected, rtol=1e-6)


def test_ddpm_leaves_out_noise_at_timestep_0_only() -> None:
    whole = of(step_table(config("DDPMScheduler", variance_type="fixed_large"), "ddpm", 1000), "d")
    assert np.flatnonzero(whole == 0.0).tolist() == [999]
    # A spacing that ends above timestep 0 keeps the noise of its last step, as in diffusers.
    trailing = config("DDPMScheduler", variance_type="fixed_large", timestep_spacing="trailing")
    assert np.all(of(step_table(trailing, "ddpm", 50), "d") > 0.0)


def test_learned_variance_columns_by_hand() -> None:
    schedule = schedule_with(variance_type="learned_range", prediction_type="sample")
    table = step_table(schedule, "ddpm", 3, learned_variance=True)
    alpha = 0.36 / 0.64
    bounds = of(table, "d", "log_var_min", "log_var_max")
    np.testing.assert_allclose(bounds[0], [1.0, np.log(0.36 / 0.64 * (1 - alpha)), np.log(1 - alpha)], rtol=1e-6)
    assert of(table, "p", "q").tolist() == [[0.0, 1.0]] * 3
    # The last step adds no noise, and its vanishing variance has a finite logarithm.
    np.testing.assert_allclose(bounds[-1, :2], [0.0, np.log(1e-20)], rtol=1e-6)


def test_second_order_row_by_hand() -> None:
    # Half-log-SNR of ln 0.5, ln 1, ln 2 ...: equal intervals of ln 2, so 1/(2r) is 0.5.
    levels = np.array([1 / (1 + ratio**-2) for ratio in (4.0, 2.0, 1.0, 0.5)])
    table = step_table(NoiseSchedule(alphas_cumprod=levels, timestep_spacing="trailing"), "dpmpp-2m", 4)
    gain = 0.5 * levels[1] ** 0.5
    rows = of(table, "a", "b", "c0", "c1", "c2", "d")
    expected = [((1 - levels[1]) / (1 - levels[2])) ** 0.5, 1.5 * gain, -0.5 * gain, 0.0, 0.0, 0.0]
    # lower_order_final holds for a short run, whose step before the last is of second order too.
    np.testing.assert_allclose(rows[1], expected, rtol=1e-6)
    assert rows[0, 2] == 0.0
    assert rows[-1].tolist() == [0.0, 1.0, 0.0, 0.0, 0.0, 0.0]


def test_plms_repeats_a_timestep_and_starts_again_from_its_first_sample() -> None:
    table = step_table(config(), "pndm", 4)
    assert table.timesteps.tolist() == [750, 500, 500, 250, 0]
    assert of(table, "u", "v", "w").tolist() == [[0, 1, 0], [0, 0, 1], [0, 1, 0], [0, 1, 0], [0, 1, 0]]
    a, g, c0 = of(table, "a", "g", "c0")[:2].T
    # Twice the same way from the same sample, with the mean of both outputs.
    np.testing.assert_allclose([a[1], g[1], c0[1]], [1.0, g[0] / 2, -g[0] / 2], rtol=1e-6)
    assert step_table(config(), "pndm", 1).timesteps.tolist() == [0]


def test_tcd_jumps_too_far_and_comes_back() -> None:
    schedule = config("TCDScheduler")
    table = step_table(schedule, "tcd", 4)
    assert table.timesteps.tolist() == [999, 759, 499, 259]
    levels = schedule.alphas_cumprod
    kept = levels[759] / levels[int(0.7 * 759)]
    expected = [kept * levels[531], kept * (1 - levels[531]), 1 - kept]
    np.testing.assert_allclose(of(table, "b", "g", "d")[0] ** 2, expected, rtol=1e-5)
    assert not of(step_table(schedule, "tcd", 4, eta=0.0), "d").any()


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("learned_variance", [False, True])
def test_dtypes_shapes_and_read_only(sampler: str, learned_variance: bool) -> None:
    table = step_table(config(), sampler, 20, learned_variance=learned_variance)
    rows = 21 if sampler == "pndm" else 20
    assert table.steps == rows
    assert table.coefficients.dtype == np.float32
    assert table.coefficients.shape == (rows, 15 if learned_variance else 13)
    for array in (table.timesteps, table.signal, table.noise):
        assert (array.dtype, array.shape) == (np.float64, (rows,))
    for array in (table.timesteps, table.coefficients, table.signal, table.noise):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


@settings(max_examples=40, deadline=None)
@given(
    sampler=st.sampled_from(SAMPLERS),
    steps=st.integers(1, 999),
    spacing=st.sampled_from(["leading", "linspace", "trailing"]),
    betas=st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
    prediction=st.sampled_from(["epsilon", "v_prediction"]),
    sigmas=st.sampled_from([None, "karras", "exponential", "beta"]),
)
def test_every_table_is_finite_and_falls_through_the_timesteps(
    sampler: str, steps: int, spacing: str, betas: str, prediction: str, sigmas: Any
) -> None:
    steps = min(steps, 50) if sampler in ("lcm", "tcd") else steps
    sigmas = sigmas if sampler in ("euler", "euler-a", "lms", "dpmpp-2m", "dpmpp-3m-sde", "unipc", "deis") else None
    schedule = config(timestep_spacing=spacing, beta_schedule=betas, prediction_type=prediction)
    table = step_table(schedule, sampler, steps, sigmas=sigmas)
    assert table.steps == steps + (sampler == "pndm" and steps > 1)
    assert np.all(np.diff(table.timesteps) <= 0)
    assert 0 <= table.timesteps[-1] <= table.timesteps[0] < 1000
    assert np.all(np.isfinite(table.coefficients))
    # A step looks no further back than the run is long.
    history = of(table, "c0", "c1", "c2")
    assert not np.triu(history[:3]).any()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 1000), st.floats(0.0, 1.0), st.sampled_from(["leading", "linspace", "trailing"]), st.booleans())
def test_ddim_keeps_the_signal_and_the_noise_power(steps: int, eta: float, spacing: str, clipped_output: bool) -> None:
    """x_t = alpha*x0 + sigma*eps with the true x0 arrives with the signal and the noise of the next level."""
    schedule = config(timestep_spacing=spacing)
    table = step_table(schedule, "ddim", steps, eta=eta, use_clipped_model_output=clipped_output)
    a, b, g, d = of(table, "a", "b", "g", "d").T
    next_timesteps = table.timesteps.astype(int) - 1000 // steps
    next_level = np.where(next_timesteps >= 0, schedule.alphas_cumprod[next_timesteps], 1.0)
    np.testing.assert_allclose(a * table.signal + b, np.sqrt(next_level), atol=1e-6)
    np.testing.assert_allclose((a * table.noise + g) ** 2 + d**2, 1 - next_level, atol=1e-6)


def test_ddim_at_eta_1_is_ddpm_with_the_small_variance() -> None:
    schedule = config()
    np.testing.assert_allclose(
        step_table(schedule, "ddim", 50, eta=1.0, use_clipped_model_output=True).coefficients,
        step_table(schedule, "ddpm", 50).coefficients,
        rtol=2e-6,
        atol=1e-7,
    )


def test_euler_of_leading_spacing_is_unclipped_ddim_at_eta_0() -> None:
    schedule = config(clip_sample=False, timestep_spacing="leading")
    ddim, euler = (of(step_table(schedule, sampler, 50), "a", "b", "g", "p", "q") for sampler in ("ddim", "euler"))

    def folded(rows: Any) -> Any:
        a, b, g, p, q = rows.T
        return np.stack([a + b * p, b * q + g])

    np.testing.assert_allclose(folded(ddim), folded(euler), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("sampler", ["euler", "euler-a", "lms"])
def test_where_a_run_of_sigmas_starts(sampler: str, spacing: Any) -> None:
    table = step_table(config(), sampler, 10, timestep_spacing=spacing)
    assert table.initial_scale == (1.0 if spacing == "leading" else table.noise[0])


def test_the_spacing_of_a_config_that_names_none_is_that_of_the_sampler() -> None:
    for sampler, first in (("ddim", 900), ("euler", 999), ("dpmpp-2m", 999), ("pndm", 900), ("lcm", 999)):
        assert step_table(config(), sampler, 10).timesteps[0] == first
        written = config(timestep_spacing="leading")
        assert step_table(written, sampler, 10).timesteps[0] == {"dpmpp-2m": 900, "lcm": 999}.get(sampler, 900)
        assert step_table(written, sampler, 10, timestep_spacing="trailing").timesteps[0] == 999


def test_whole_and_fractional_timesteps() -> None:
    assert step_table(config(), "euler", 10, timestep_spacing="leading").has_whole_timesteps
    assert step_table(config(), "euler", 10, timestep_spacing="linspace").has_whole_timesteps  # 999/9 = 111
    assert not step_table(config(), "euler", 11, timestep_spacing="linspace").has_whole_timesteps
    assert not step_table(config(), "euler", 10, sigmas="karras").has_whole_timesteps
    assert step_table(config(), "dpmpp-2m", 10, sigmas="karras").has_whole_timesteps


def test_the_head_of_a_table_and_where_a_second_model_takes_over() -> None:
    table = step_table(config(timestep_spacing="leading", steps_offset=1), "euler", 50)
    rows = table.rows_before(0.8, 1000)
    assert table.timesteps[rows - 1] >= 200 > table.timesteps[rows]
    head = table.head(rows)
    assert head.steps == rows
    assert np.array_equal(head.coefficients, table.coefficients[:rows])
    assert np.array_equal(head.signal, table.signal[:rows])
    rest = step_table(config(timestep_spacing="leading", steps_offset=1), "euler", 50, first_step=rows)
    assert np.array_equal(rest.timesteps, table.timesteps[rows:])


@pytest.mark.parametrize(("strength", "first"), [(1.0, 0), (0.8, 2), (0.75, 3), (0.1, 9)])
def test_strength_counts_as_in_diffusers(strength: float, first: int) -> None:
    assert first_step_of_strength(10, strength) == first


@pytest.mark.parametrize("strength", [0.05, 0.0])
def test_a_strength_without_a_step_is_refused(strength: float) -> None:
    with pytest.raises(InputError, match=f"strength={strength} of 10 steps leaves no step"):
        first_step_of_strength(10, strength)


@pytest.mark.parametrize("strength", [-0.1, 1.1])
def test_a_strength_out_of_range_is_refused(strength: float) -> None:
    with pytest.raises(InputError, match=r"is out of range; choose 0 \.\. 1"):
        first_step_of_strength(10, strength)


@pytest.mark.parametrize("sampler", ["dpmpp-2m", "dpmpp-3m-sde", "unipc", "deis", "pndm"])
def test_a_sampler_that_looks_back_starts_afresh(sampler: str) -> None:
    table = step_table(config(), sampler, 10, first_step=4)
    assert not np.triu(of(table, "c0", "c1", "c2")[:3]).any()
    assert np.array_equal(table.timesteps, step_table(config(), sampler, 10).timesteps[4:])


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "euler", "euler-a", "lcm", "tcd"])
def test_the_rest_of_another_table_is_its_tail(sampler: str) -> None:
    table, whole = (step_table(config(), sampler, 10, first_step=first) for first in (4, 0))
    assert np.array_equal(table.coefficients, whole.coefficients[4:])
    assert np.array_equal(table.signal, whole.signal[4:])


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


@pytest.mark.parametrize("sampler", ["DDIM", ""])
def test_an_unknown_sampler_is_refused(sampler: str) -> None:
    with pytest.raises(InputError, match=f"sampler '{sampler}' is unknown; choose one of ddpm, ddim, pndm"):
        step_table(config(), sampler, 10)


@pytest.mark.parametrize(
    ("sampler", "nearest"),
    [
        ("heun", "euler or dpmpp-2m"),
        ("dpm2", "dpmpp-2m"),
        ("dpm2-a", "euler-a"),
        ("dpmpp-sde", "dpmpp-2m-sde"),
        ("plms", "pndm"),
    ],
)
def test_a_sampler_that_is_not_offered_names_the_nearest(sampler: str, nearest: str) -> None:
    with pytest.raises(InputError, match=f"sampler '{sampler}' is unknown; the nearest is {nearest}; all are ddpm"):
        step_table(config(), sampler, 10)


@pytest.mark.parametrize("steps", [0, -3, 1001])
def test_steps_out_of_range_are_refused(steps: int) -> None:
    with pytest.raises(InputError, match=rf"steps={steps} is out of range.* 1 \.\. 1000"):
        step_table(config(), "ddim", steps)


@pytest.mark.parametrize("eta", [-0.1, 1.5, float("nan")])
def test_eta_out_of_range_is_refused(eta: float) -> None:
    with pytest.raises(InputError, match=f"eta={eta} is out of range"):
        step_table(config(), "ddim", 10, eta=eta)


@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        ("ddpm", {"eta": 0.5}),
        ("euler", {"eta": 0.5}),
        ("euler", {"use_clipped_model_output": True}),
        ("ddim", {"sigmas": "karras"}),
        ("pndm", {"sigmas": "spaced"}),
        ("ddim", {"timesteps": [500]}),
        ("unipc", {"timesteps": [500]}),
        ("dpmpp-2m", {"original_inference_steps": 50}),
    ],
)
def test_an_option_of_another_sampler_is_refused(sampler: str, options: dict[str, Any]) -> None:
    name = next(iter(options))
    with pytest.raises(InputError, match=rf"{name}=.* was given for sampler '{sampler}', but only .* know it"):
        step_table(config(), sampler, None if "timesteps" in options else 10, **options)


def test_an_eta_of_zero_is_nobodys_option() -> None:
    assert step_table(config(), "euler", 10, eta=0.0).steps == 10


@pytest.mark.parametrize(
    ("sampler", "options", "message"),
    [
        ("euler", {"timesteps": [100, 200]}, "must fall strictly"),
        ("euler", {"timesteps": [1000, 200]}, r"lie in 0 \.\. 999"),
        ("ddpm", {"timesteps": [100.5, 20]}, "must be whole numbers"),
        ("euler", {"sigmas": [1.0]}, "two or more finite values"),
        ("euler", {"sigmas": [1.0, 2.0, 0.0]}, "two or more finite values that fall strictly"),
        ("euler", {"sigmas": [1.0, -0.5]}, "two or more finite values"),
        ("dpmpp-2m", {"sigmas": [1.0, 0.5]}, "takes no list of sigmas"),
        ("unipc", {"sigmas": [1.0, 0.5]}, "takes no list of sigmas"),
        ("euler", {"sigmas": [1.0, 0.5], "timesteps": [500]}, "both timesteps and sigmas were listed"),
        ("dpmpp-2m", {"sigmas": "karras", "timesteps": [500]}, "listed together with 'karras' sigmas"),
        ("euler", {"timesteps": [500, 0], "steps": 3}, "steps=3, but 2 steps were listed"),
        ("euler", {}, "no number of steps was given"),
        ("lcm", {"steps": 51}, "distilled on 50 timesteps"),
        ("lcm", {"steps": 4, "original_inference_steps": 1001}, "original_inference_steps=1001 is more than"),
        ("tcd", {"steps": 4, "original_inference_steps": 3}, "4 steps are more than original_inference_steps=3"),
        ("lms", {"steps": 10, "first_step": 1}, "sampler 'lms' cannot start at step 1"),
        ("euler", {"steps": 10, "first_step": 10}, r"first_step=10 is out of range; this run has steps 0 \.\. 9"),
        ("pndm", {"steps": 10, "first_step": 11}, r"first_step=11 is out of range; this run has steps 0 \.\. 10"),
    ],
)
def test_options_that_cannot_be_used_are_refused(sampler: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        step_table(config(), sampler, **options)


@pytest.mark.parametrize(
    ("sampler", "options", "message"),
    [
        ("pndm", {"skip_prk_steps": False}, "skip_prk_steps=False, so PNDM would start with Runge-Kutta steps"),
        ("pndm", {"prediction_type": "sample"}, "prediction_type='sample'.* sampler 'pndm' does not know"),
        ("lms", {"prediction_type": "sample"}, "sampler 'lms' remembers predicted noise"),
        ("deis", {"prediction_type": "sample"}, "sampler 'deis' remembers predicted noise"),
        ("deis", {"solver_order": 4}, "solver_order=4, and sampler 'deis' knows 1 to 3"),
        ("unipc", {"solver_order": 4}, "solver_order=4, which sampler 'unipc' does not implement"),
        ("unipc", {"predict_x0": False}, "predict_x0=False, which sampler 'unipc'"),
        ("unipc", {"solver_p": ["diffusers", "DDIMScheduler"]}, "solver_p=.*, which sampler 'unipc'"),
        ("unipc", {"lower_order_final": False}, "would end at an infinite step of high order"),
        (
            "euler",
            {"timestep_type": "continuous", "prediction_type": "v_prediction"},
            "timestep_type='continuous' for a v_prediction model",
        ),
        ("pndm", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr=True, which sampler 'pndm' does not know"),
        ("lms", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr=True, which sampler 'lms' does not know"),
        ("deis", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr=True, which sampler 'deis' does not know"),
    ],
)
def test_options_of_a_config_are_refused_by_the_samplers_they_mean_something_to(
    sampler: str, options: dict[str, Any], message: str
) -> None:
    schedule = config(**options)
    with pytest.raises(InputError, match=message):
        step_table(schedule, sampler, 10)
    assert step_table(schedule, "dpmpp-2m", 10).steps == 10


def test_pndm_of_a_config_that_does_not_skip_its_first_steps() -> None:
    # The default of its own class; a config of another class means PLMS.
    with pytest.raises(InputError, match="skip_prk_steps=False"):
        step_table(config("PNDMScheduler"), "pndm", 10)
    assert step_table(config("DDIMScheduler"), "pndm", 10).steps == 11


@pytest.mark.parametrize("variance_type", ["learned", "fixed_large_log"])
def test_unsupported_variance_types_are_refused_by_ddpm_alone(variance_type: str) -> None:
    schedule = config("DDPMScheduler", variance_type=variance_type)
    assert step_table(schedule, "ddim", 10).steps == 10
    with pytest.raises(InputError, match=f"variance_type='{variance_type}' is not supported by sampler 'ddpm'"):
        step_table(schedule, "ddpm", 10)


def test_learned_range_without_a_learned_variance_is_refused() -> None:
    with pytest.raises(InputError, match="variance_type='learned_range' needs a model with twice as many output"):
        step_table(config("DDPMScheduler", variance_type="learned_range"), "ddpm", 10)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "lcm", "tcd"])
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


@pytest.mark.parametrize("sampler", ["euler", "euler-a", "lms"])
def test_a_graph_of_whole_timesteps_gets_whole_ones_where_nobody_names_a_spacing(sampler: str) -> None:
    silent, named = config(), config(timestep_spacing="linspace")
    assert not step_table(silent, sampler, 7).has_whole_timesteps
    found = step_table(silent, sampler, 7, whole_timesteps=True)
    np.testing.assert_array_equal(found.timesteps, step_table(silent, sampler, 7, timestep_spacing="leading").timesteps)
    # Who names one gets it, and hears of what does not fit.
    assert not step_table(named, sampler, 7, whole_timesteps=True).has_whole_timesteps
