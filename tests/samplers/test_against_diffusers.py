"""Whole trajectories of every sampler against the scheduler of diffusers, with the same network and the same noise."""

import json
import warnings
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from qdm_deploy.samplers import (
    HISTORY,
    SAMPLERS,
    NoiseSchedule,
    StepTable,
    apply_step,
    default_sampler,
    first_step_of_strength,
    initial_noise,
    step_noise,
    step_table,
)

Array = NDArray[np.float32]
Model = Callable[[Array, float], Array]

SHAPE = (3, 6, 5)
SEEDS = [3, 4]

# The modules whose schedulers draw their own noise.
_DRAWING = ("ddpm", "ddim", "euler_ancestral_discrete", "dpmsolver_multistep", "lcm", "tcd")

# diffusers calls numpy in a way that numpy 2 deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]

# What float32 leaves of a float64 table, and of a scheduler that computes its coefficients in float32.
ENOUGH_DB = 100.0

# Of these two, torch's square roots and logarithms may be one unit in the last place off.
TIMESTEP_TOLERANCE = 1e-4

STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SPACINGS = ["leading", "linspace", "trailing"]
SIGMAS = ["karras", "exponential", "beta"]

SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddpm": (diffusers.DDPMScheduler, {"clip_sample": False}),
    "ddim": (diffusers.DDIMScheduler, {"clip_sample": False}),
    "pndm": (diffusers.PNDMScheduler, {"skip_prk_steps": True}),
    "lms": (diffusers.LMSDiscreteScheduler, {}),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "euler-a": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "dpmpp-2m": (diffusers.DPMSolverMultistepScheduler, {}),
    "dpmpp-2m-sde": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "dpmpp-3m": (diffusers.DPMSolverMultistepScheduler, {"solver_order": 3}),
    "dpmpp-3m-sde": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}),
    "unipc": (diffusers.UniPCMultistepScheduler, {}),
    "deis": (diffusers.DEISMultistepScheduler, {}),
    "lcm": (diffusers.LCMScheduler, {}),
    "tcd": (diffusers.TCDScheduler, {}),
}
# diffusers does not know predicted images there, or (deis, lms) they are refused here. The scheduler of lms integrates
# its coefficients numerically, which is slow: it runs fewer lengths.
NO_PREDICTED_IMAGES = ("pndm", "euler-a", "deis", "lms")
# Its coefficients are differences of logarithms that cancel in float32.
IN_FLOAT64 = ("deis",)


def model(sample: Array, timestep: float) -> Array:
    """Nonlinear in the image and in the timestep, and bounded, like a network's prediction."""
    neighbour = np.roll(sample, 1, axis=-1)
    return np.asarray(np.tanh(0.8 * sample - 0.3 * neighbour + np.sin(0.05 * timestep)), dtype=np.float32)


def noise_model(sample: Array, timestep: float) -> Array:
    """Mostly the noise that is in the sample, as a trained network predicts it, so that images stay bounded."""
    share = np.float32(np.sqrt(min(1.0, 0.02 + timestep / 1000)))
    neighbour = np.roll(sample, 1, axis=-1)
    return np.asarray(share * sample + 0.05 * np.sin(2 * neighbour + 0.05 * timestep), dtype=np.float32)


def model_with_variance(sample: Array, timestep: float) -> Array:
    share = np.asarray(np.tanh(0.4 * sample + np.cos(0.03 * timestep)), dtype=np.float32)
    return np.concatenate([model(sample, timestep), share], axis=1)


def config_of(scheduler: Any) -> dict[str, object]:
    config: dict[str, object] = json.loads(scheduler.to_json_string())
    return config


def schedule_of(scheduler: Any) -> NoiseSchedule:
    return NoiseSchedule.from_config(config_of(scheduler))


def image() -> Array:
    """A clean image for runs that start from one."""
    return np.tanh(2 * initial_noise([11, 12], SHAPE))


def walk(table: StepTable, network: Model = model, *, from_image: bool = False) -> list[Array]:
    """The samples after each row of a table."""
    noise = initial_noise(SEEDS, SHAPE)
    sample = noise * np.float32(table.initial_scale)
    if from_image:
        sample = np.float32(table.signal[0]) * image() + np.float32(table.noise[0]) * noise
    history = np.zeros((len(SEEDS), HISTORY * SHAPE[0], *SHAPE[1:]), np.float32)
    states = []
    for step, timestep in enumerate(table.timesteps):
        rows = np.repeat(table.coefficients[step : step + 1], len(SEEDS), axis=0)
        output = network(sample, float(timestep))
        sample, _, history = apply_step(rows, sample, output, history, step_noise(SEEDS, step, SHAPE))
        states.append(sample)
    return states


def reference_walk(
    scheduler: Any,
    monkeypatch: pytest.MonkeyPatch,
    network: Model = model,
    *,
    first_step: int = 0,
    from_image: bool = False,
    float64: bool = False,
    **options: Any,
) -> list[Array]:
    """The same from a scheduler whose timesteps are set, in the coordinates of the network.

    With ``float64`` it computes its coefficients and its samples in float64, where it can.
    """
    if float64:
        scheduler.sigmas = scheduler.sigmas.double()
    current: list[torch.Tensor] = []
    for name in _DRAWING:
        module = f"diffusers.schedulers.scheduling_{name}"
        monkeypatch.setattr(f"{module}.randn_tensor", lambda *_args, **_kwargs: current[-1])
    sigma_space = hasattr(scheduler, "is_scale_input_called")
    size = np.sqrt(scheduler.sigmas.numpy().astype(np.float64) ** 2 + 1) if sigma_space else None
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first_step)
    timesteps = scheduler.timesteps[first_step:]
    noise = torch.from_numpy(initial_noise(SEEDS, SHAPE)).to(torch.float64 if float64 else torch.float32)
    if from_image:
        sample = scheduler.add_noise(torch.from_numpy(image()), noise, timesteps[:1])
    else:
        sample = noise * scheduler.init_noise_sigma
    states = []
    for step, timestep in enumerate(timesteps):
        scaled = scheduler.scale_model_input(sample, timestep) if sigma_space else sample
        output = torch.from_numpy(network(scaled.numpy().astype(np.float32), float(timestep))).to(noise.dtype)
        current.append(torch.from_numpy(step_noise(SEEDS, step, SHAPE)))
        sample = scheduler.step(output, timestep, sample, **options).prev_sample
        state = sample.numpy()
        states.append(state if size is None else (state / size[first_step + step + 1]).astype(np.float32))
    return states


def sqnr_db(mine: list[Array], reference: list[Array]) -> float:
    """The smallest signal-to-error ratio of the states of a run, in dB."""
    assert len(mine) == len(reference)
    ratios = []
    for one, other in zip(mine, reference, strict=True):
        error = np.sum((one.astype(np.float64) - other) ** 2)
        ratios.append(np.inf if error == 0 else 10 * np.log10(np.sum(other.astype(np.float64) ** 2) / error))
    return float(np.min(ratios))


def scheduler_of(sampler: str, **options: Any) -> Any:
    kind, own = SCHEDULERS[sampler]
    return kind(**{**STABLE_DIFFUSION, **own, **options})


def network_of(scheduler: Any) -> Model:
    return noise_model if scheduler.config["prediction_type"] == "epsilon" else model


def agreement(
    scheduler: Any,
    steps: int,
    monkeypatch: pytest.MonkeyPatch,
    *,
    network: Model | None = None,
    options: dict[str, Any] | None = None,
    step_options: dict[str, Any] | None = None,
    set_options: dict[str, Any] | None = None,
) -> float:
    """SQNR of the table of the scheduler's own config against the scheduler."""
    sampler = default_sampler(config_of(scheduler))
    table = step_table(schedule_of(scheduler), sampler, steps or None, **(options or {}))
    scheduler.set_timesteps(**(set_options or {"num_inference_steps": steps}))
    np.testing.assert_allclose(table.timesteps, scheduler.timesteps.numpy(), rtol=0, atol=TIMESTEP_TOLERANCE)
    assert table.has_whole_timesteps == bool(np.all(scheduler.timesteps.numpy() % 1 == 0))
    network = network or network_of(scheduler)
    reference = reference_walk(scheduler, monkeypatch, network, float64=sampler in IN_FLOAT64, **(step_options or {}))
    return sqnr_db(walk(table, network), reference)


@pytest.mark.parametrize(
    ("sampler", "prediction"),
    [
        (sampler, prediction)
        for sampler in SAMPLERS
        for prediction in ("epsilon", "v_prediction", "sample")
        if not (prediction == "sample" and sampler in NO_PREDICTED_IMAGES)
    ],
)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_spacing_prediction_and_length(
    sampler: str, spacing: str, prediction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [3, 15]
    if sampler == "lms":
        lengths = [1, 7]
    elif prediction == "epsilon":
        lengths = [1, 2, 3, 8, 14, 15, 50]
    for steps in lengths:
        scheduler = scheduler_of(sampler, timestep_spacing=spacing, prediction_type=prediction)
        assert default_sampler(config_of(scheduler)) == sampler
        assert agreement(scheduler, steps, monkeypatch) > ENOUGH_DB, f"{steps} steps"


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_offset(sampler: str, spacing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = scheduler_of(sampler, timestep_spacing=spacing, steps_offset=1)
    assert agreement(scheduler, 9, monkeypatch) > ENOUGH_DB


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large"])
@pytest.mark.parametrize("clip", [True, False])
def test_ddpm_variances(spacing: str, variance: str, clip: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for steps in (1, 2, 20):
        scheduler = diffusers.DDPMScheduler(timestep_spacing=spacing, variance_type=variance, clip_sample=clip)
        assert agreement(scheduler, steps, monkeypatch, network=model) > ENOUGH_DB, f"{steps} steps"


@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddpm_with_learned_variance(spacing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = diffusers.DDPMScheduler(timestep_spacing=spacing, variance_type="learned_range")
    options = {"learned_variance": True}
    assert agreement(scheduler, 20, monkeypatch, network=model_with_variance, options=options) > ENOUGH_DB


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "lcm"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_clipping(sampler: str, prediction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = scheduler_of(
        sampler, prediction_type=prediction, clip_sample=True, clip_sample_range=0.7, steps_offset=1
    )
    steps = 4 if sampler == "lcm" else 10
    assert agreement(scheduler, steps, monkeypatch) > ENOUGH_DB
    table = step_table(schedule_of(scheduler), sampler, steps)
    free = step_table(schedule_of(scheduler_of(sampler, prediction_type=prediction, steps_offset=1)), sampler, steps)
    # The bound is met: without it the run is another one.
    assert sqnr_db(walk(table, network_of(scheduler)), walk(free, network_of(scheduler))) < 40


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("clipped_output", [True, False])
@pytest.mark.parametrize("to_one", [True, False])
def test_ddim_options(
    spacing: str, eta: float, clipped_output: bool, to_one: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"eta": eta, "use_clipped_model_output": clipped_output}
    for steps in (1, 2, 20):
        scheduler = diffusers.DDIMScheduler(
            timestep_spacing=spacing, set_alpha_to_one=to_one, prediction_type="v_prediction"
        )
        ratio = agreement(scheduler, steps, monkeypatch, options=options, step_options=options)
        assert ratio > ENOUGH_DB, f"{steps} steps"


@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_pndm_final_level(to_one: bool, prediction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = scheduler_of("pndm", set_alpha_to_one=to_one, prediction_type=prediction)
    assert agreement(scheduler, 20, monkeypatch) > ENOUGH_DB


@pytest.mark.parametrize("kind", SIGMAS)
@pytest.mark.parametrize("sampler", ["euler", "lms", "dpmpp-2m", "dpmpp-2m-sde", "dpmpp-3m", "unipc", "deis"])
def test_sigma_schedules(sampler: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for steps in (1, 10) if sampler == "lms" else (1, 2, 20):
        scheduler = scheduler_of(sampler, **{f"use_{kind}_sigmas": True})
        assert agreement(scheduler, steps, monkeypatch) > ENOUGH_DB, f"{steps} steps"
        # The caller's choice overrides the config's.
        plain = scheduler_of(sampler)
        mine = step_table(schedule_of(plain), sampler, steps, sigmas=kind)
        same = step_table(schedule_of(scheduler), sampler, steps)
        assert np.array_equal(mine.coefficients, same.coefficients)
        undone = step_table(schedule_of(scheduler), sampler, steps, sigmas="spaced")
        assert np.array_equal(undone.coefficients, step_table(schedule_of(plain), sampler, steps).coefficients)


def test_karras_timesteps_of_a_multistep_solver_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = scheduler_of("dpmpp-2m", use_karras_sigmas=True)
    table = step_table(schedule_of(scheduler), "dpmpp-2m", 50)
    assert np.count_nonzero(np.diff(table.timesteps) == 0) > 0
    assert agreement(scheduler, 50, monkeypatch) > ENOUGH_DB


@pytest.mark.parametrize("kind", SIGMAS)
@pytest.mark.parametrize("sampler", ["euler", "unipc"])
def test_bounds_of_sigma_schedules(sampler: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = scheduler_of(sampler, sigma_min=0.1, sigma_max=10.0, **{f"use_{kind}_sigmas": True})
    assert agreement(scheduler, 12, monkeypatch) > ENOUGH_DB


@pytest.mark.parametrize("kind", SIGMAS)
def test_euler_a_may_take_the_sigmas_of_euler(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers has no such option; its step is given the sigmas of its Euler scheduler."""
    scheduler, euler = scheduler_of("euler-a"), scheduler_of("euler", **{f"use_{kind}_sigmas": True})
    euler.set_timesteps(12)
    scheduler.set_timesteps(12)
    scheduler.sigmas, scheduler.timesteps = euler.sigmas, euler.timesteps
    table = step_table(schedule_of(scheduler), "euler-a", 12, sigmas=kind)
    reference = reference_walk(scheduler, monkeypatch, noise_model)
    assert sqnr_db(walk(table, noise_model), reference) > ENOUGH_DB
    # A config of another class does not make its sigmas Karras', as in diffusers.
    own = step_table(schedule_of(euler), "euler-a", 12)
    assert np.array_equal(own.coefficients, step_table(schedule_of(scheduler), "euler-a", 12).coefficients)


@pytest.mark.parametrize("kind", ["", *SIGMAS])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("interpolation", ["linear", "log_linear"])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_euler_options(
    kind: str, spacing: str, interpolation: str, final: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {f"use_{kind}_sigmas": True} if kind else {}
    scheduler = scheduler_of(
        "euler", timestep_spacing=spacing, interpolation_type=interpolation, final_sigmas_type=final, **own
    )
    assert agreement(scheduler, 12, monkeypatch) > ENOUGH_DB


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("lower_order_final", [True, False])
@pytest.mark.parametrize("euler_at_final", [True, False])
@pytest.mark.parametrize("solver", ["midpoint", "heun"])
@pytest.mark.parametrize("sampler", ["dpmpp-2m", "dpmpp-2m-sde", "dpmpp-3m-sde"])
def test_dpmpp_options(
    sampler: str,
    final: str,
    lower_order_final: bool,
    euler_at_final: bool,
    solver: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for steps in (4, 15):
        scheduler = scheduler_of(
            sampler,
            final_sigmas_type=final,
            lower_order_final=lower_order_final,
            euler_at_final=euler_at_final,
            solver_type=solver,
        )
        assert agreement(scheduler, steps, monkeypatch) > ENOUGH_DB, f"{steps} steps"


@pytest.mark.parametrize(
    "options",
    [
        {"use_lu_lambdas": True},
        {"use_lu_lambdas": True, "use_exponential_sigmas": True},
        {"lambda_min_clipped": -1.5},
        {"lambda_min_clipped": -1.5, "timestep_spacing": "leading"},
        {"lambda_min_clipped": -1.5, "timestep_spacing": "trailing"},
        {"lambda_min_clipped": -5.1, "beta_schedule": "squaredcos_cap_v2"},
        {"use_karras_sigmas": True, "beta_schedule": "squaredcos_cap_v2"},
        {"use_lu_lambdas": True, "beta_schedule": "squaredcos_cap_v2"},
    ],
)
def test_dpmpp_grids(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for steps in (2, 10, 25):
        assert agreement(scheduler_of("dpmpp-2m", **options), steps, monkeypatch) > ENOUGH_DB, f"{steps} steps"


@pytest.mark.parametrize("kind", SIGMAS)
def test_a_last_step_of_no_length_changes_nothing(kind: str) -> None:
    """Where diffusers ends at the last sigma twice, its high-order formulas are not numbers."""
    options = {f"use_{kind}_sigmas": True, "final_sigmas_type": "sigma_min", "lower_order_final": False}
    schedule = schedule_of(scheduler_of("dpmpp-3m", solver_type="heun", **options))
    states = walk(step_table(schedule, "dpmpp-3m", 10), noise_model)
    assert np.abs(states[-1] - states[-2]).max() < 1e-5


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("solver", ["bh1", "bh2"])
@pytest.mark.parametrize("lower_order_final", [True, False])
@pytest.mark.parametrize("disabled", [[], [0, 2]])
def test_unipc_options(
    order: int, solver: str, lower_order_final: bool, disabled: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for steps in (3, 16):
        scheduler = scheduler_of(
            "unipc",
            solver_order=order,
            solver_type=solver,
            lower_order_final=lower_order_final,
            disable_corrector=disabled,
            final_sigmas_type="sigma_min",
        )
        assert agreement(scheduler, steps, monkeypatch) > ENOUGH_DB, f"{steps} steps"


def test_unipc_bh1_ends_at_a_sigma_of_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers multiplies infinity by nothing in this last step; the sample it should be is x0."""
    scheduler = scheduler_of("unipc", solver_type="bh1")
    table = step_table(schedule_of(scheduler), "unipc", 8)
    scheduler.set_timesteps(8)
    states, reference = walk(table, noise_model), reference_walk(scheduler, monkeypatch, noise_model)
    assert sqnr_db(states[:-1], reference[:-1]) > ENOUGH_DB
    assert np.isnan(reference[-1]).all()
    assert np.isfinite(states[-1]).all()


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("lower_order_final", [True, False])
def test_deis_options(order: int, lower_order_final: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for steps in (2, 3, 10, 20):
        scheduler = scheduler_of("deis", solver_order=order, lower_order_final=lower_order_final)
        assert agreement(scheduler, steps, monkeypatch) > ENOUGH_DB, f"{steps} steps"


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "lcm", "tcd", "dpmpp-2m", "dpmpp-2m-sde", "unipc"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_zero_terminal_snr(sampler: str, spacing: str, prediction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for steps in (1, 16):
        scheduler = scheduler_of(
            sampler, rescale_betas_zero_snr=True, timestep_spacing=spacing, prediction_type=prediction
        )
        assert agreement(scheduler, steps, monkeypatch) > ENOUGH_DB, f"{steps} steps"


@pytest.mark.parametrize("sampler", ["euler", "dpmpp-2m", "unipc"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_zero_terminal_snr_with_predicted_noise(sampler: str, spacing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = scheduler_of(sampler, rescale_betas_zero_snr=True, timestep_spacing=spacing)
    assert agreement(scheduler, 20, monkeypatch, network=model) > ENOUGH_DB


@pytest.mark.parametrize("sampler", ["euler", "euler-a"])
def test_euler_from_zero_terminal_snr(sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers takes the first step in float32 at a sigma of 4096, which costs it digits of the next state."""
    for spacing in SPACINGS:
        scheduler = scheduler_of(
            sampler, rescale_betas_zero_snr=True, timestep_spacing=spacing, prediction_type="v_prediction"
        )
        assert agreement(scheduler, 20, monkeypatch) > 85.0


@pytest.mark.parametrize("original", [None, 10, 50])
def test_lcm_original_steps(original: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = scheduler_of("lcm", original_inference_steps=25, timestep_scaling=5.0)
    for steps in (1, 2, 4, 8):
        ratio = agreement(
            scheduler,
            steps,
            monkeypatch,
            options={"original_inference_steps": original},
            set_options={"num_inference_steps": steps, "original_inference_steps": original},
        )
        assert ratio > ENOUGH_DB, f"{steps} steps"


@pytest.mark.parametrize("eta", [0.0, 0.2, 0.3, 1.0])
@pytest.mark.parametrize("original", [None, 20])
def test_tcd_gamma_and_original_steps(eta: float, original: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for steps in (1, 2, 4, 7):
        scheduler = scheduler_of("tcd", prediction_type="v_prediction")
        ratio = agreement(
            scheduler,
            steps,
            monkeypatch,
            options={"eta": eta, "original_inference_steps": original},
            set_options={"num_inference_steps": steps, "original_inference_steps": original},
            step_options={"eta": eta},
        )
        assert ratio > ENOUGH_DB, f"{steps} steps"


AYS = diffusers.schedulers.AysSchedules


@pytest.mark.parametrize("sampler", ["ddpm", "euler", "dpmpp-2m", "dpmpp-2m-sde", "lcm", "tcd"])
@pytest.mark.parametrize("timesteps", [AYS["StableDiffusionTimesteps"], [800], [999, 499]])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_listed_timesteps(sampler: str, timesteps: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = scheduler_of(sampler)
    ratio = agreement(scheduler, 0, monkeypatch, options={"timesteps": timesteps}, set_options={"timesteps": timesteps})
    assert ratio > ENOUGH_DB


@pytest.mark.parametrize("name", ["StableDiffusionSigmas", "StableDiffusionXLSigmas"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_listed_sigmas(name: str, spacing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = scheduler_of("euler", timestep_spacing=spacing)
    ratio = agreement(scheduler, 0, monkeypatch, options={"sigmas": AYS[name]}, set_options={"sigmas": AYS[name]})
    assert ratio > ENOUGH_DB


@pytest.mark.parametrize("strength", [0.25, 0.6, 0.95, 1.0])
@pytest.mark.parametrize("sampler", [sampler for sampler in SAMPLERS if sampler != "lms"])
def test_from_an_image(sampler: str, strength: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the image-to-image pipelines run: noise is added to the image, and the rest of the timesteps is walked."""
    for steps in (8, 16):
        scheduler = scheduler_of(sampler)
        first = first_step_of_strength(steps, strength)
        table = step_table(schedule_of(scheduler), sampler, steps, first_step=first)
        scheduler.set_timesteps(steps)
        np.testing.assert_allclose(table.timesteps, scheduler.timesteps[first:].numpy(), atol=TIMESTEP_TOLERANCE)
        mine = walk(table, noise_model, from_image=True)
        float64 = sampler in IN_FLOAT64
        reference = reference_walk(
            scheduler, monkeypatch, noise_model, first_step=first, from_image=True, float64=float64
        )
        assert sqnr_db(mine, reference) > ENOUGH_DB, f"{steps} steps"


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_levels_are_those_of_added_noise(sampler: str) -> None:
    scheduler = scheduler_of(sampler)
    table = step_table(schedule_of(scheduler), sampler, 10)
    scheduler.set_timesteps(10)
    if hasattr(scheduler, "sigmas"):
        sigmas = scheduler.sigmas.numpy()[:-1]
        np.testing.assert_allclose(table.signal, 1 / np.sqrt(sigmas.astype(np.float64) ** 2 + 1), rtol=1e-6)
    else:
        levels = scheduler.alphas_cumprod.numpy()[scheduler.timesteps.numpy()]
        np.testing.assert_allclose(table.signal**2, levels, rtol=1e-6)
    np.testing.assert_allclose(table.signal**2 + table.noise**2, 1.0, rtol=1e-12)


def test_ddim_of_a_learned_variance_model_ignores_the_variance() -> None:
    schedule = schedule_of(diffusers.DDIMScheduler())
    plain = walk(step_table(schedule, "ddim", 10, eta=1.0))
    learned = walk(step_table(schedule, "ddim", 10, eta=1.0, learned_variance=True), model_with_variance)
    assert all(np.array_equal(one, other) for one, other in zip(plain, learned, strict=True))


@pytest.mark.parametrize("sampler", SAMPLERS)
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
    kind, own = SCHEDULERS[sampler]
    steps = 4 if sampler in ("lcm", "tcd") else 20
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        published = diffusers.PNDMScheduler.from_config(written)
        scheduler = kind.from_config(published.config, **own)
    table = step_table(NoiseSchedule.from_config(written), sampler, steps)
    scheduler.set_timesteps(steps)
    assert table.timesteps.tolist() == scheduler.timesteps.tolist()
    float64 = sampler in IN_FLOAT64
    assert sqnr_db(walk(table, noise_model), reference_walk(scheduler, monkeypatch, noise_model, float64=float64)) > 100
