"""A network that knows the noise: whatever the sampler, a deterministic step then lands on the level it aims at.

If x = signal*image + noise*z and the network predicts that very z (or its v, or the image), then x0 is the image at
every step, the multistep differences vanish, and the next sample is the same image and z at the next level.
"""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qdm_deploy.samplers import HISTORY, NoiseSchedule, StepTable, apply_step, column, step_table

IMAGE, NOISE = (np.random.default_rng(seed).normal(size=(1, 1, 6, 6)) for seed in (1, 2))

DETERMINISTIC = ["ddim", "pndm", "lms", "euler", "dpmpp-2m", "dpmpp-3m", "unipc", "deis"]
SOLVERS = ["lms", "euler", "dpmpp-2m", "dpmpp-3m", "unipc", "deis"]


def schedule_of(prediction: str, **options: object) -> NoiseSchedule:
    config = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "clip_sample": False}
    return NoiseSchedule.from_config({**config, "prediction_type": prediction, **options})


def perfect(prediction: str, signal: float, noise: float) -> Any:
    answers = {"epsilon": NOISE, "sample": IMAGE, "v_prediction": signal * NOISE - noise * IMAGE}
    return answers[prediction].astype(np.float32)


def largest_error(table: StepTable, prediction: str) -> float:
    """Of x0 at every row, and of the sample at every row but the last, in units of what float32 resolves there."""
    history = np.zeros((1, HISTORY, 6, 6), np.float32)
    sample = (table.signal[0] * IMAGE + table.noise[0] * NOISE).astype(np.float32)
    largest = 0.0
    for row in range(table.steps):
        signal, noise = table.signal[row], table.noise[row]
        aimed = signal * IMAGE + noise * NOISE
        output = perfect(prediction, signal, noise)
        largest = max(largest, float(np.abs(sample - aimed).max()))
        coefficients = table.coefficients[row : row + 1]
        sample, x0, history = apply_step(coefficients, aimed.astype(np.float32), output, history, NOISE * 0)
        scale = max(1.0, float(np.abs(table.coefficients[row, column("p")])))
        assert np.abs(x0 - IMAGE).max() < 2e-6 * scale
    return largest


@settings(max_examples=60, deadline=None)
@given(
    sampler=st.sampled_from(DETERMINISTIC),
    steps=st.integers(2, 60),
    first=st.floats(0, 0.9),
    prediction=st.sampled_from(["epsilon", "v_prediction", "sample"]),
)
def test_every_step_lands_on_the_next_level(sampler: str, steps: int, first: float, prediction: str) -> None:
    # Those that remember noise know no predicted images, and PLMS mixes the v of different levels.
    if (prediction == "sample" and sampler in ("lms", "deis")) or sampler == "pndm":
        prediction = "epsilon"
    # DDIM and PLMS go down by T // S, which is the next timestep where S divides T and the spacing is leading.
    if sampler in ("ddim", "pndm"):
        steps = max(size for size in (2, 4, 5, 8, 10, 20, 25, 40, 50) if size <= steps or size == 2)
    # The tails of lms are refused, those of PLMS are one level off.
    first_step = 0 if sampler in ("pndm", "lms") else int(first * steps)
    spacing = "leading" if sampler in ("ddim", "pndm") else None
    table = step_table(schedule_of(prediction), sampler, steps, timestep_spacing=spacing, first_step=first_step)
    assert largest_error(table, prediction) < 2e-5


@settings(max_examples=40, deadline=None)
@given(
    sampler=st.sampled_from(SOLVERS),
    steps=st.integers(2, 60),
    sigmas=st.sampled_from(["karras", "exponential", "beta"]),
    final=st.sampled_from(["zero", "sigma_min"]),
)
def test_every_step_lands_on_the_next_level_of_other_sigmas(sampler: str, steps: int, sigmas: Any, final: str) -> None:
    table = step_table(schedule_of("epsilon", final_sigmas_type=final), sampler, steps, sigmas=sigmas)
    assert largest_error(table, "epsilon") < 2e-5


@pytest.mark.parametrize("sampler", ["euler", "dpmpp-2m", "dpmpp-3m", "unipc"])
@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_a_start_without_signal(sampler: str, spacing: Any, prediction: str) -> None:
    schedule = schedule_of(prediction, rescale_betas_zero_snr=True)
    table = step_table(schedule, sampler, 20, timestep_spacing=spacing)
    assert table.signal[0] == pytest.approx(2.0**-12, rel=1e-6)
    assert largest_error(table, prediction) < 2e-5


@pytest.mark.parametrize("sampler", ["dpmpp-2m-sde", "dpmpp-3m-sde", "euler-a", "lcm", "tcd", "ddpm"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_fresh_noise_makes_up_for_what_a_stochastic_step_drops(sampler: str, prediction: str) -> None:
    """With the perfect network the mean of the next sample holds the next level's signal, and its variance the rest."""
    steps = 8
    table = step_table(schedule_of(prediction), sampler, steps)
    d = table.coefficients[:, column("d")].astype(np.float64)
    for row in range(steps - 1):
        signal, noise = table.signal[row], table.noise[row]
        sample = (signal * IMAGE + noise * NOISE).astype(np.float32)
        output = perfect(prediction, signal, noise)
        # What the solver remembers of a perfect network is the image.
        history = np.repeat(IMAGE, HISTORY, axis=1).astype(np.float32)
        mean, _, _ = apply_step(table.coefficients[row : row + 1], sample, output, history, NOISE * 0)
        kept = np.linalg.lstsq(
            np.stack([IMAGE.ravel(), NOISE.ravel()], axis=1), mean.ravel().astype(np.float64), rcond=None
        )[0]
        # LCM blends a little of the noisy sample into its image.
        tolerance = 2e-3 if sampler == "lcm" else 2e-5
        assert kept[0] == pytest.approx(table.signal[row + 1], abs=tolerance)
        if sampler != "ddpm":  # whose posterior knows more than the level: its variance is the smaller one
            assert kept[1] ** 2 + d[row] ** 2 == pytest.approx(table.noise[row + 1] ** 2, abs=tolerance)
