"""Whole trajectories of every sampler against the scheduler of diffusers, with the same model and the same noise."""

import json
import warnings
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from qdm_deploy.samplers import NoiseSchedule, StepTable, apply_step, initial_noise, step_noise, step_table

Array = NDArray[np.float32]
Model = Callable[[Array, int], Array]

# diffusers calls numpy in a way that numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SHAPE = (3, 6, 5)
SEEDS = [3, 4]
STEPS = [1, 2, 10, 50]
SPACINGS = ["leading", "linspace", "trailing"]
PREDICTIONS = ["epsilon", "v_prediction", "sample"]


def model(sample: Array, timestep: int) -> Array:
    """Nonlinear in the image and in the timestep, and bounded, like a network's prediction."""
    neighbour = np.roll(sample, 1, axis=-1)
    return np.asarray(np.tanh(0.8 * sample - 0.3 * neighbour + np.sin(0.05 * timestep)), dtype=np.float32)


def model_with_variance(sample: Array, timestep: int) -> Array:
    share = np.asarray(np.tanh(0.4 * sample + np.cos(0.03 * timestep)), dtype=np.float32)
    return np.concatenate([model(sample, timestep), share], axis=1)


def schedule_of(scheduler: Any) -> NoiseSchedule:
    return NoiseSchedule.from_config(json.loads(scheduler.to_json_string()))


def ours(table: StepTable, network: Model = model) -> list[Array]:
    sample = initial_noise(SEEDS, SHAPE)
    previous_x0 = np.zeros_like(sample)
    states = []
    for step, timestep in enumerate(table.timesteps):
        rows = np.repeat(table.coefficients[step : step + 1], len(SEEDS), axis=0)
        output = network(sample, int(timestep))
        sample, previous_x0 = apply_step(rows, sample, output, previous_x0, step_noise(SEEDS, step, SHAPE))
        states.append(sample)
    return states


def theirs(
    scheduler: Any, update: Callable[[torch.Tensor, Any, torch.Tensor, torch.Tensor], Any], network: Model = model
) -> list[Array]:
    sample = torch.from_numpy(initial_noise(SEEDS, SHAPE))
    states = []
    for step, timestep in enumerate(scheduler.timesteps):
        output = torch.from_numpy(network(sample.numpy(), int(timestep)))
        noise = torch.from_numpy(step_noise(SEEDS, step, SHAPE))
        sample = update(output, timestep, sample, noise).prev_sample
        states.append(sample.numpy())
    return states


def assert_same_trajectory(mine: list[Array], reference: list[Array]) -> None:
    assert len(mine) == len(reference)
    for step, (one, other) in enumerate(zip(mine, reference, strict=True)):
        # Unclipped noise predictions reach 1/sqrt(alphas_cumprod) in one step, so the bound follows the state's size.
        bound = 1e-4 * max(1.0, float(np.abs(other).max()))
        assert np.abs(one - other).max() <= bound, f"step {step}"


def ddpm_reference(scheduler: Any, monkeypatch: pytest.MonkeyPatch, network: Model = model) -> list[Array]:
    current: list[torch.Tensor] = []
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *args, **kwargs: current[-1], raising=True
    )

    def update(output: torch.Tensor, timestep: Any, sample: torch.Tensor, noise: torch.Tensor) -> Any:
        current.append(noise)
        return scheduler.step(output, timestep, sample)

    return theirs(scheduler, update, network)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large"])
@pytest.mark.parametrize("clip", [True, False])
def test_ddpm(steps: int, spacing: Any, variance: Any, clip: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = diffusers.DDPMScheduler(timestep_spacing=spacing, variance_type=variance, clip_sample=clip)
    table = step_table(schedule_of(scheduler), "ddpm", steps)
    scheduler.set_timesteps(steps)
    assert table.timesteps.tolist() == scheduler.timesteps.tolist()
    assert_same_trajectory(ours(table), ddpm_reference(scheduler, monkeypatch))


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddpm_with_learned_variance(steps: int, spacing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = diffusers.DDPMScheduler(timestep_spacing=spacing, variance_type="learned_range")
    table = step_table(schedule_of(scheduler), "ddpm", steps, learned_variance=True)
    assert table.coefficients.shape == (steps, 9)
    scheduler.set_timesteps(steps)
    mine = ours(table, model_with_variance)
    assert_same_trajectory(mine, ddpm_reference(scheduler, monkeypatch, model_with_variance))


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"])
def test_ddpm_predictions_and_schedules(prediction: Any, betas: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = diffusers.DDPMScheduler(prediction_type=prediction, beta_schedule=betas, clip_sample_range=1.5)
    table = step_table(schedule_of(scheduler), "ddpm", 10)
    scheduler.set_timesteps(10)
    assert_same_trajectory(ours(table), ddpm_reference(scheduler, monkeypatch))


def ddim_reference(scheduler: Any, eta: float) -> list[Array]:
    return theirs(
        scheduler,
        lambda output, timestep, sample, noise: scheduler.step(
            output, timestep, sample, eta=eta, use_clipped_model_output=True, variance_noise=noise
        ),
    )


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("to_one", [True, False])
def test_ddim(steps: int, spacing: Any, eta: float, clip: bool, to_one: bool) -> None:
    scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing, clip_sample=clip, set_alpha_to_one=to_one)
    table = step_table(schedule_of(scheduler), "ddim", steps, eta=eta)
    scheduler.set_timesteps(steps)
    assert table.timesteps.tolist() == scheduler.timesteps.tolist()
    assert_same_trajectory(ours(table), ddim_reference(scheduler, eta))


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("betas", ["scaled_linear", "squaredcos_cap_v2"])
def test_ddim_predictions_and_schedules(prediction: Any, betas: Any) -> None:
    scheduler = diffusers.DDIMScheduler(prediction_type=prediction, beta_schedule=betas, steps_offset=1)
    table = step_table(schedule_of(scheduler), "ddim", 20, eta=0.5)
    scheduler.set_timesteps(20)
    assert_same_trajectory(ours(table), ddim_reference(scheduler, 0.5))


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_ddim_from_zero_terminal_snr(prediction: Any) -> None:
    scheduler = diffusers.DDIMScheduler(
        prediction_type=prediction, rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    # At eta 1 the first step of diffusers takes the root of a float32 difference that is exactly zero: off by 1e-3.
    table = step_table(schedule_of(scheduler), "ddim", 20, eta=0.5)
    scheduler.set_timesteps(20)
    assert_same_trajectory(ours(table), ddim_reference(scheduler, 0.5))


def test_ddim_of_a_learned_variance_model_ignores_the_variance() -> None:
    scheduler = diffusers.DDIMScheduler()
    schedule = schedule_of(scheduler)
    plain = ours(step_table(schedule, "ddim", 10, eta=1.0))
    learned = ours(step_table(schedule, "ddim", 10, eta=1.0, learned_variance=True), model_with_variance)
    assert all(np.array_equal(one, other) for one, other in zip(plain, learned, strict=True))


def dpmpp_reference(scheduler: Any) -> list[Array]:
    return theirs(scheduler, lambda output, timestep, sample, noise: scheduler.step(output, timestep, sample))


@pytest.mark.parametrize("steps", [*STEPS, 14, 15])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("lower_order_final", [True, False])
def test_dpmpp_2m(steps: int, spacing: Any, lower_order_final: bool) -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(timestep_spacing=spacing, lower_order_final=lower_order_final)
    table = step_table(schedule_of(scheduler), "dpmpp-2m", steps)
    scheduler.set_timesteps(steps)
    assert table.timesteps.tolist() == scheduler.timesteps.tolist()
    assert_same_trajectory(ours(table), dpmpp_reference(scheduler))


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("options", [{"beta_schedule": "scaled_linear"}, {"rescale_betas_zero_snr": True}])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_dpmpp_2m_predictions_and_schedules(prediction: Any, options: dict[str, Any], spacing: Any) -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(prediction_type=prediction, timestep_spacing=spacing, **options)
    table = step_table(schedule_of(scheduler), "dpmpp-2m", 20)
    scheduler.set_timesteps(20)
    assert_same_trajectory(ours(table), dpmpp_reference(scheduler))


def euler_reference(scheduler: Any) -> list[Array]:
    """diffusers keeps x * sqrt(sigma**2 + 1); states are brought back to the coordinates of the network."""
    size = (scheduler.sigmas.to(torch.float64) ** 2 + 1.0).sqrt().to(torch.float32)
    sample = torch.from_numpy(initial_noise(SEEDS, SHAPE)) * size[0]
    states = []
    for step, timestep in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(sample, timestep)
        output = torch.from_numpy(model(scaled.numpy(), int(timestep)))
        sample = scheduler.step(output, timestep, sample).prev_sample
        states.append((sample / size[step + 1]).numpy())
    return states


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_euler(steps: int, spacing: Any, prediction: Any) -> None:
    scheduler = diffusers.EulerDiscreteScheduler(
        timestep_spacing=spacing, prediction_type=prediction, beta_schedule="scaled_linear"
    )
    table = step_table(schedule_of(scheduler), "euler", steps)
    scheduler.set_timesteps(steps)
    assert table.timesteps.tolist() == scheduler.timesteps.tolist()
    assert_same_trajectory(ours(table), euler_reference(scheduler))


def test_euler_linspace_takes_the_rounded_timesteps_of_diffusers() -> None:
    scheduler = diffusers.EulerDiscreteScheduler(timestep_spacing="linspace")
    table = step_table(schedule_of(scheduler), "euler", 30)
    scheduler.set_timesteps(30)
    assert table.timesteps.tolist() == scheduler.timesteps.round().int().tolist()
    # Given the whole timesteps, diffusers takes the same path.
    scheduler.set_timesteps(timesteps=table.timesteps.tolist())
    assert_same_trajectory(ours(table), euler_reference(scheduler))


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp-2m", "euler"])
def test_a_published_stable_diffusion_config(sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PNDM config with an offset: every sampler as diffusers builds it from that config."""
    written = {
        "_class_name": "PNDMScheduler",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
    }
    table = step_table(NoiseSchedule.from_config(written), sampler, 20)
    known = {
        "ddpm": diffusers.DDPMScheduler,
        "ddim": diffusers.DDIMScheduler,
        "dpmpp-2m": diffusers.DPMSolverMultistepScheduler,
        "euler": diffusers.EulerDiscreteScheduler,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # PNDM's default spacing, which the written config leaves out, is leading.
        scheduler = known[sampler].from_config({**written, "timestep_spacing": "leading"})
    scheduler.set_timesteps(20)
    assert table.timesteps.tolist() == scheduler.timesteps.tolist()
    reference = {
        "ddpm": lambda: ddpm_reference(scheduler, monkeypatch),
        "ddim": lambda: ddim_reference(scheduler, 0.0),
        "dpmpp-2m": lambda: dpmpp_reference(scheduler),
        "euler": lambda: euler_reference(scheduler),
    }[sampler]()
    assert_same_trajectory(ours(table), reference)
