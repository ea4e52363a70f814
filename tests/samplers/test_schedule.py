"""The schedule read from a config against the one diffusers builds from the same config."""

import json
from typing import Any

import diffusers
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qdm_deploy.errors import InputError
from qdm_deploy.samplers import NoiseSchedule, default_sampler
from qdm_deploy.samplers.betas import named_betas

# diffusers calls numpy in a way that numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

CLASSES = {
    "DDPMScheduler": ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"],
    "DDIMScheduler": ["linear", "scaled_linear", "squaredcos_cap_v2"],
    "PNDMScheduler": ["linear", "scaled_linear", "squaredcos_cap_v2"],
    "DPMSolverMultistepScheduler": ["linear", "scaled_linear", "squaredcos_cap_v2"],
    "EulerDiscreteScheduler": ["linear", "scaled_linear", "squaredcos_cap_v2"],
    "EulerAncestralDiscreteScheduler": ["linear", "scaled_linear", "squaredcos_cap_v2"],
    "UniPCMultistepScheduler": ["scaled_linear"],
    "DEISMultistepScheduler": ["scaled_linear"],
    "LCMScheduler": ["linear", "scaled_linear"],
    "TCDScheduler": ["scaled_linear"],
}


def config_of(scheduler: Any) -> dict[str, object]:
    config: dict[str, object] = json.loads(scheduler.to_json_string())
    return config


def largest_error(schedule: NoiseSchedule, scheduler: Any) -> float:
    return float(np.abs(schedule.alphas_cumprod - scheduler.alphas_cumprod.numpy()).max())


@pytest.mark.parametrize(("name", "betas"), [(name, betas) for name, known in CLASSES.items() for betas in known])
@pytest.mark.parametrize("timesteps", [7, 1000])
def test_levels_are_those_of_diffusers(name: str, betas: str, timesteps: int) -> None:
    scheduler = getattr(diffusers, name)(
        beta_schedule=betas, beta_start=0.00085, beta_end=0.012, num_train_timesteps=timesteps
    )
    schedule = NoiseSchedule.from_config(config_of(scheduler))
    assert largest_error(schedule, scheduler) <= 1e-6
    assert schedule.num_train_timesteps == timesteps
    assert schedule.alphas_cumprod.dtype == np.float64


@pytest.mark.parametrize("name", ["DDPMScheduler", "LCMScheduler", "DPMSolverMultistepScheduler"])
@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_zero_terminal_snr_levels_are_those_of_diffusers(name: str, betas: str) -> None:
    scheduler = getattr(diffusers, name)(beta_schedule=betas, rescale_betas_zero_snr=True)
    schedule = NoiseSchedule.from_config(config_of(scheduler))
    assert largest_error(schedule, scheduler) <= 1e-6
    assert schedule.has_zero_terminal_snr
    assert schedule.alphas_cumprod[-1] == 0.0
    assert schedule.positive_alphas_cumprod()[-1] == 2.0**-24


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(1e-4, 0.5), min_size=1, max_size=50))
def test_trained_betas_are_used_as_they_are(betas: list[float]) -> None:
    scheduler = diffusers.DDPMScheduler(trained_betas=betas, num_train_timesteps=len(betas))
    assert largest_error(NoiseSchedule.from_config(config_of(scheduler)), scheduler) <= 1e-6


@settings(max_examples=50, deadline=None)
@given(st.floats(1e-5, 0.01), st.floats(0.011, 0.2), st.integers(2, 2000), st.sampled_from(["linear", "scaled_linear"]))
def test_linear_betas_rise_from_start_to_end(start: float, end: float, timesteps: int, name: Any) -> None:
    betas = named_betas(name, start, end, timesteps)
    assert betas.shape == (timesteps,)
    assert np.all(np.diff(betas) >= 0)
    np.testing.assert_allclose([betas[0], betas[-1]], [start, end], rtol=3e-7)


def test_hand_computed_levels() -> None:
    config = {"_class_name": "DDIMScheduler", "trained_betas": [0.5, 0.75], "num_train_timesteps": 2}
    assert NoiseSchedule.from_config(config).alphas_cumprod.tolist() == [0.5, 0.125]


def test_a_written_config_keeps_every_value() -> None:
    scheduler = diffusers.DDPMScheduler(
        prediction_type="v_prediction",
        variance_type="learned_range",
        clip_sample=True,
        clip_sample_range=2.5,
        timestep_spacing="trailing",
        steps_offset=3,
    )
    schedule = NoiseSchedule.from_config(config_of(scheduler))
    assert schedule.prediction_type == "v_prediction"
    assert schedule.variance_type == "learned_range"
    assert (schedule.clip_sample, schedule.clip_sample_range) == (True, 2.5)
    assert (schedule.timestep_spacing, schedule.steps_offset) == ("trailing", 3)


@pytest.mark.parametrize("name", [*CLASSES, "LMSDiscreteScheduler"])
def test_missing_keys_take_the_defaults_of_the_class(name: str) -> None:
    schedule = NoiseSchedule.from_config({"_class_name": name})
    scheduler = getattr(diffusers, name)()
    assert largest_error(schedule, scheduler) <= 1e-6
    assert schedule.clip_sample == scheduler.config.get("clip_sample", False)
    assert schedule.prediction_type == scheduler.config["prediction_type"]
    # These two are defaults of the sampler that runs, whatever the class of the config.
    assert (schedule.timestep_spacing, schedule.set_alpha_to_one) == (None, None)


def test_keys_of_another_class_count_when_they_are_written() -> None:
    schedule = NoiseSchedule.from_config({"_class_name": "PNDMScheduler", "clip_sample": True, "skip_prk_steps": True})
    assert schedule.clip_sample is True


def test_null_means_default() -> None:
    assert (
        NoiseSchedule.from_config({"_class_name": "DDIMScheduler", "variance_type": None}).variance_type
        == "fixed_small"
    )


def test_solver_options_are_kept() -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(
        use_karras_sigmas=True, solver_order=3, lambda_min_clipped=-5.1, solver_type="heun", euler_at_final=True
    )
    options = NoiseSchedule.from_config(config_of(scheduler)).solver
    assert options.sigma_schedule == "karras"
    assert (options.solver_order, options.lambda_min_clipped) == (3, -5.1)
    assert (options.solver_type, options.euler_at_final) == ("heun", True)


def test_levels_cannot_be_written_to() -> None:
    schedule = NoiseSchedule.from_config({"_class_name": "DDIMScheduler"})
    with pytest.raises(ValueError, match="read-only"):
        schedule.alphas_cumprod[0] = 0.5


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", None, 3])
def test_other_classes_are_refused(name: object) -> None:
    with pytest.raises(InputError, match=f"of class {name!r}; known are DDPMScheduler"):
        NoiseSchedule.from_config({"_class_name": name})


def test_a_config_without_a_class_is_refused() -> None:
    with pytest.raises(InputError, match="of class None; known are"):
        NoiseSchedule.from_config({"beta_start": 0.001})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("beta_schedule", "quadratic"),
        ("prediction_type", "flow_prediction"),
        ("variance_type", "huge"),
        ("timestep_spacing", "random"),
        ("num_train_timesteps", 0),
        ("beta_start", 0.0),
        ("beta_end", 1.0),
        ("steps_offset", -1),
        ("clip_sample_range", 0.0),
        ("clip_sample", "perhaps"),
        ("solver_type", "euler"),
        ("final_sigmas_type", "small"),
        ("sigma_min", 0.0),
    ],
)
def test_unknown_values_are_refused(key: str, value: object) -> None:
    with pytest.raises(InputError, match=f"has {key}={value!r}: .*; correct scheduler_config.json"):
        NoiseSchedule.from_config({"_class_name": "DDPMScheduler", key: value})


def test_dynamic_thresholding_is_refused() -> None:
    config = config_of(diffusers.DDPMScheduler(thresholding=True))
    with pytest.raises(InputError, match="thresholding=True; a step must be affine"):
        NoiseSchedule.from_config(config)


def test_trained_betas_of_another_length_are_refused() -> None:
    config = {"_class_name": "DDPMScheduler", "trained_betas": [0.1, 0.2], "num_train_timesteps": 3}
    with pytest.raises(InputError, match="trained_betas holds 2 values but num_train_timesteps is 3"):
        NoiseSchedule.from_config(config)


@pytest.mark.parametrize("betas", [[0.0, 0.1], [0.1, 0.0], [0.5, 1.5], [0.5, float("nan")]])
def test_betas_that_do_not_add_noise_are_refused(betas: list[float]) -> None:
    config = {"_class_name": "DDPMScheduler", "trained_betas": betas, "num_train_timesteps": 2}
    with pytest.raises(InputError, match=r"alphas_cumprod has shape \(2,\) and values .* falling row of values"):
        NoiseSchedule.from_config(config)


@pytest.mark.parametrize("shape", [(0,), (2, 2)])
def test_levels_must_be_one_row(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=f"alphas_cumprod has shape {shape}".replace("(", r"\(").replace(")", r"\)")):
        NoiseSchedule(alphas_cumprod=np.full(shape, 0.5))


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("HeunDiscreteScheduler", "EulerDiscreteScheduler"),
        ("KDPM2AncestralDiscreteScheduler", "EulerAncestralDiscreteScheduler"),
        ("DPMSolverSinglestepScheduler", "DPMSolverMultistepScheduler"),
    ],
)
def test_classes_that_are_not_offered_name_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(InputError, match=f"of class '{name}'; known are .*: the nearest is {nearest}"):
        NoiseSchedule.from_config({"_class_name": name})


def test_flow_matching_is_refused() -> None:
    with pytest.raises(InputError, match="use_flow_sigmas=True: the model learned flow matching"):
        NoiseSchedule.from_config({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True})


def test_two_sigma_schedules_are_refused() -> None:
    config = {"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True, "use_beta_sigmas": True}
    with pytest.raises(InputError, match="more than one of use_karras_sigmas"):
        NoiseSchedule.from_config(config)


@pytest.mark.parametrize(
    ("name", "options", "sampler"),
    [
        ("DDPMScheduler", {}, "ddpm"),
        ("DDIMScheduler", {}, "ddim"),
        ("PNDMScheduler", {}, "pndm"),
        ("LMSDiscreteScheduler", {}, "lms"),
        ("EulerDiscreteScheduler", {}, "euler"),
        ("EulerAncestralDiscreteScheduler", {}, "euler-a"),
        ("DPMSolverMultistepScheduler", {}, "dpmpp-2m"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "deis"}, "dpmpp-2m"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "dpmpp-2m-sde"),
        ("DPMSolverMultistepScheduler", {"solver_order": 3}, "dpmpp-3m"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}, "dpmpp-3m-sde"),
        ("UniPCMultistepScheduler", {}, "unipc"),
        ("DEISMultistepScheduler", {}, "deis"),
        ("LCMScheduler", {}, "lcm"),
        ("TCDScheduler", {}, "tcd"),
    ],
)
def test_the_sampler_of_a_config(name: str, options: dict[str, object], sampler: str) -> None:
    assert default_sampler({"_class_name": name, **options}) == sampler


@pytest.mark.parametrize(
    ("options", "nearest"),
    [
        ({"algorithm_type": "dpmsolver"}, "dpmpp-2m"),
        ({"algorithm_type": "sde-dpmsolver"}, "dpmpp-2m-sde"),
        ({"solver_order": 1}, "dpmpp-2m"),
    ],
)
def test_a_solver_without_a_sampler_is_refused(options: dict[str, object], nearest: str) -> None:
    with pytest.raises(InputError, match=f"name the sampler yourself, '{nearest}' is the nearest"):
        default_sampler({"_class_name": "DPMSolverMultistepScheduler", **options})
