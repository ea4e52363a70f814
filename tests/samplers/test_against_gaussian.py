"""Samplers on data whose ideal network is known in closed form: every pixel is N(MEAN, DEVIATION**2).

With alpha = sqrt(level) and sigma = sqrt(1 - level), x_t is N(alpha*MEAN, alpha**2*DEVIATION**2 + sigma**2), the ideal
noise prediction is sigma*(x - alpha*MEAN)/variance, and the probability-flow ODE keeps (x - mean)/deviation of x_t
constant. So the end of a deterministic sampler is known per pixel, and that of a stochastic one in distribution.
"""

import numpy as np
import pytest
from numpy.typing import NDArray

from qdm_deploy.samplers import (
    COEFFICIENTS,
    HISTORY,
    NoiseSchedule,
    StepTable,
    apply_step,
    initial_noise,
    step_noise,
    step_table,
)
from qdm_deploy.samplers.schedule import TimestepSpacing, VarianceType

Array = NDArray[np.float32]

MEAN, DEVIATION = 0.4, 0.3
SHAPE = (1, 64, 64)


def smooth_schedule(intervals: int, spacing: TimestepSpacing) -> NoiseSchedule:
    """Half-log-SNR linear in time from 1 to -2.5, so that no interval of a uniform grid is longer than another.

    A usual schedule cannot show an order: its last interval stays one unit of log-SNR long, however many steps.
    """
    half_log_snr = np.linspace(1.0, -2.5, intervals + 1)
    return NoiseSchedule(alphas_cumprod=1.0 / (1.0 + np.exp(-2.0 * half_log_snr)), timestep_spacing=spacing)


def linear_schedule(
    spacing: TimestepSpacing = "trailing", variance_type: VarianceType = "fixed_small"
) -> NoiseSchedule:
    config = {"_class_name": "DDPMScheduler", "clip_sample": False}
    return NoiseSchedule.from_config({**config, "timestep_spacing": spacing, "variance_type": variance_type})


def moments(level: float) -> tuple[float, float]:
    """Mean and standard deviation of x_t at a signal level."""
    return MEAN * level**0.5, (level * DEVIATION**2 + 1.0 - level) ** 0.5


def ideal_noise(sample: Array, level: float) -> Array:
    mean, deviation = moments(level)
    return np.asarray((1.0 - level) ** 0.5 * (sample - mean) / deviation**2, dtype=np.float32)


def run(table: StepTable, sample: Array, seeds: list[int], steps: int) -> Array:
    history = np.repeat(np.zeros_like(sample), HISTORY, axis=1)
    for step in range(steps):
        output = ideal_noise(sample, table.signal[step] ** 2)
        rows = np.repeat(table.coefficients[step : step + 1], len(seeds), axis=0)
        sample, _, history = apply_step(rows, sample, output, history, step_noise(seeds, step, sample.shape[1:]))
    return sample


def error_before_the_final_step(sampler: str, intervals: int) -> float:
    """Largest error on the stretch of the ODE between the first and the last timestep of the table.

    The final step, from the last timestep to a level of one, is first-order in every sampler and left out.
    """
    total = 960
    if sampler == "ddim":
        schedule = smooth_schedule(total - 1, "leading")
        table = step_table(schedule, sampler, intervals)
    else:
        schedule = smooth_schedule(total, "linspace")
        # The multistep grid lays one point more than steps and leaves out the last; that of Euler and LMS does not.
        table = step_table(schedule, sampler, intervals + 1 if sampler in ("euler", "lms") else intervals)
    standard = np.linspace(-2.0, 2.0, 64, dtype=np.float32).reshape(1, 1, 8, 8)
    first, last = (moments(table.signal[end] ** 2) for end in (0, -1))
    end = run(table, np.asarray(first[0] + first[1] * standard, dtype=np.float32), [0], table.steps - 1)
    return float(np.abs(end - (last[0] + last[1] * standard)).max())


@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("euler", 1), ("dpmpp-2m", 2), ("deis", 2)])
def test_observed_order_is_the_declared_order(sampler: str, order: int) -> None:
    errors = [error_before_the_final_step(sampler, intervals) for intervals in (15, 30, 60)]
    observed = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    np.testing.assert_allclose(observed, order, atol=0.25)


def test_the_corrector_of_unipc_adds_an_order() -> None:
    errors = [error_before_the_final_step("unipc", intervals) for intervals in (15, 30, 60)]
    assert np.all(np.log2(np.array(errors[:-1]) / np.array(errors[1:])) > 2.75)


@pytest.mark.parametrize(("better", "worse"), [("dpmpp-3m", "dpmpp-2m"), ("lms", "euler"), ("unipc", "dpmpp-2m")])
def test_a_higher_order_is_nearer(better: str, worse: str) -> None:
    # The first steps of dpmpp-3m and lms are of low order, so that their own order does not show.
    assert error_before_the_final_step(better, 15) < 0.5 * error_before_the_final_step(worse, 15)


def test_second_order_needs_fewer_steps() -> None:
    assert error_before_the_final_step("dpmpp-2m", 15) < 0.2 * error_before_the_final_step("euler", 15)


def error_at_the_end(sampler: str, steps: int) -> float:
    schedule = linear_schedule()
    table = step_table(schedule, sampler, steps)
    noise = initial_noise([5], SHAPE)
    mean, deviation = moments(table.signal[0] ** 2)
    exact = MEAN + DEVIATION * (noise - mean) / deviation
    return float(np.abs(run(table, noise, [5], table.steps) - exact).max())


@pytest.mark.parametrize("sampler", ["ddim", "euler"])
def test_first_order_samplers_converge_to_the_end_of_the_ode(sampler: str) -> None:
    errors = [error_at_the_end(sampler, steps) for steps in (250, 500, 1000)]
    assert errors[-1] < 6e-3
    np.testing.assert_allclose([errors[0] / errors[1], errors[1] / errors[2]], 2.0, atol=0.2)


def test_the_multistep_sampler_reaches_the_end_of_the_ode_in_a_few_steps() -> None:
    # What is left is the final first-order step from a variance of 1e-4.
    assert error_at_the_end("dpmpp-2m", 125) < 4e-4


def mean_and_deviation(table: StepTable) -> tuple[float, float]:
    """Exact moments at the end of a table: the ideal network is affine, so x stays Gaussian all the way."""
    mean, variance = 0.0, 1.0
    for signal, row in zip(table.signal, table.coefficients.astype(np.float64), strict=True):
        p, q, a, b, g, d = (row[COEFFICIENTS.index(name)] for name in ("p", "q", "a", "b", "g", "d"))
        mean_t, deviation_t = moments(signal**2)
        slope = (1.0 - signal**2) ** 0.5 / deviation_t**2
        of_output = b * q + g
        gain = a + b * p + of_output * slope
        mean, variance = gain * mean - of_output * slope * mean_t, gain**2 * variance + d**2
    return mean, variance**0.5


STOCHASTIC = [("ddpm", "fixed_small", 0.0), ("ddpm", "fixed_large", 0.0), ("ddim", "fixed_small", 1.0)]


@pytest.mark.parametrize(("sampler", "variance_type", "eta"), [*STOCHASTIC, ("ddim", "fixed_small", 0.5)])
def test_stochastic_samplers_converge_to_the_data(sampler: str, variance_type: VarianceType, eta: float) -> None:
    schedule = linear_schedule("leading", variance_type)
    errors = []
    for steps in (250, 500, 1000):
        mean, deviation = mean_and_deviation(step_table(schedule, sampler, steps, eta=eta))
        # A run starts at mean 0 instead of sqrt(level)*MEAN, which eta 0.5 does not quite forget.
        assert abs(mean - MEAN) < 2e-4
        errors.append(abs(deviation - DEVIATION))
    assert errors[-1] < 4e-3
    assert 1.7 < errors[0] / errors[1] < 2.3
    assert 1.7 < errors[1] / errors[2] < 2.3


@pytest.mark.parametrize(("sampler", "variance_type", "eta"), STOCHASTIC)
def test_generated_pixels_have_the_moments_of_the_table(sampler: str, variance_type: VarianceType, eta: float) -> None:
    schedule = linear_schedule("leading", variance_type)
    table = step_table(schedule, sampler, 100, eta=eta)
    seeds = list(range(8))
    pixels = run(table, initial_noise(seeds, SHAPE), seeds, table.steps).astype(np.float64)
    mean, deviation = mean_and_deviation(table)
    # Four standard errors at n = 32 768.
    assert abs(pixels.mean() - mean) < 4.0 * deviation / pixels.size**0.5
    assert abs(pixels.std() - deviation) < 4.0 * deviation / (2.0 * pixels.size) ** 0.5
    # And independent from sample to sample.
    correlation = np.corrcoef(pixels.reshape(len(seeds), -1))
    assert np.abs(correlation - np.eye(len(seeds))).max() < 5.0 / 64.0
