"""How much each step matters: against algebra where the network is linear, against whole runs where it is not."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qdm_calibration.importance import StepImportance, disturbance, measure_importance
from qdm_deploy.artifacts.pipeline_spec import Denoiser
from qdm_deploy.artifacts.step_interface import StepInterface
from qdm_deploy.building.simulation import TorchSession
from qdm_deploy.errors import CheckFailed
from qdm_deploy.runtime import denoise
from qdm_deploy.samplers import NoiseSchedule, column, step_table
from qdm_deploy.samplers.sampling import Sampling

LINEAR = Denoiser(interface=StepInterface.of((2, 6, 6), coefficients=13), num_train_timesteps=1000)
SCHEDULE = NoiseSchedule.from_config(
    {"_class_name": "DDPMScheduler", "num_train_timesteps": 1000, "clip_sample": False, "beta_schedule": "linear"}
)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpmpp-2m", "unipc"])
def test_a_linear_network_gives_what_algebra_gives(sampler: str) -> None:
    table, slope = step_table(SCHEDULE, sampler, 9), 0.3

    def factor(disturbed: int) -> float:
        """d (finished sample) / d (output of the network at one step)."""
        x, history = 0.0, (0.0, 0.0, 0.0)
        for step, row in enumerate(table.coefficients.astype(np.float64)):
            k = {name: row[column(name)] for name in ("p", "q", "a", "b", "g", "c0", "c1", "c2", "u", "v", "w")}
            output = slope * x + (step == disturbed)
            x0 = k["p"] * x + k["q"] * output
            past = sum(k[name] * value for name, value in zip(("c0", "c1", "c2"), history, strict=True))
            x = k["a"] * x + k["b"] * x0 + k["g"] * output + past
            history = (k["u"] * x0 + k["v"] * output + k["w"] * history[0], *history[:2])
        return float(x)

    found = measure_importance(lambda sample, timestep: slope * sample, LINEAR, Sampling(table, [0, 1]), batch_size=7)
    expected = np.array([factor(step) ** 2 for step in range(9)])[::-1]
    assert found.timesteps.tolist() == table.timesteps[::-1].tolist()
    np.testing.assert_allclose(found.absolute, expected / expected.mean(), rtol=0.02)


class _Disturbed(nn.Module):
    """A network with the same noise added to its output whenever it meets one timestep."""

    def __init__(self, network: nn.Module, timestep: int, noise: Tensor) -> None:
        super().__init__()
        self.network, self.timestep, self.noise = network, timestep, noise

    def forward(self, sample: Tensor, timestep: Tensor, **conditioning: Tensor) -> Tensor:
        output: Tensor = self.network(sample, timestep, **conditioning)
        return output + self.noise if int(timestep[0]) == self.timestep else output


def test_a_guided_network_gives_what_disturbed_runs_give(tiny: Any) -> None:
    from qdm_export.step_graph import StepGraph

    checkpoint, table, seeds = tiny.checkpoint("labels"), tiny.table("labels"), (5, 6)
    sampling = Sampling(table, seeds, tiny.conditioning("labels").take(slice(2)), guidance=1.5)
    found = measure_importance(checkpoint.unet, checkpoint.denoiser, sampling, measured_steps=4)
    steps = [0, 4, 7, 11]
    assert found.timesteps.tolist() == [table.timesteps[step] for step in reversed(steps)]

    def finished(step: int, size: float) -> Any:
        noise = np.stack([disturbance(seed, step, checkpoint.spec.sample_shape) for seed in seeds]) * size
        rows = torch.from_numpy(np.repeat(noise, 2, axis=0).astype(np.float32))  # a sample's and its twin's
        network = _Disturbed(checkpoint.unet, int(table.timesteps[step]), rows)
        session = TorchSession(StepGraph(network, checkpoint.denoiser).eval(), "disturbed")
        samples = denoise(session, sampling)
        return samples.astype(np.float64), (noise**2).mean(axis=(1, 2, 3))

    plain, _ = finished(0, 0.0)
    direct = []
    for step in steps:
        samples, size = finished(step, 0.01)
        direct.append(float((((samples - plain) ** 2).mean(axis=(1, 2, 3)) / size).mean()))
    expected = np.array(direct)[::-1]
    assert expected.max() > 1.5 * expected.min()
    np.testing.assert_allclose(found.absolute, expected / expected.mean(), rtol=0.05)


def test_what_was_measured_is_found_again_by_timestep() -> None:
    found = StepImportance(np.array([0, 400, 900]), np.array([2.0, 0.4, 0.6]), np.array([0.1, 1.0, 1.0]))
    assert found.at(np.array([0, 10, 190, 399, 640, 999])).tolist() == [2.0, 2.0, 2.0, 0.4, 0.4, 0.6]
    # Relative noise counts by the power of the output too: 0.2, 0.4 and 0.6; half of the third bin is nearer to 900.
    weights = found.over(np.array([0, 200, 400, 900, 1000]))
    each = np.array([0.2, (0.2 + 0.4 * 199) / 200, (0.4 * 251 + 0.6 * 249) / 500, 0.6])
    np.testing.assert_allclose(weights, each / each.mean(), rtol=1e-9)
    assert weights.mean() == pytest.approx(1.0)


def test_no_step_matters_more_where_nothing_matters() -> None:
    schedule = NoiseSchedule.from_config(
        {"_class_name": "DDPMScheduler", "clip_sample": True, "beta_schedule": "linear"}
    )
    # An output that is far out of range: every pixel is clipped, whatever noise is added.
    table = step_table(schedule, "ddim", 4, use_clipped_model_output=True)
    found = measure_importance(
        lambda sample, timestep: -1e6 + 0 * sample, LINEAR, Sampling(table, [0]), relative_size=1e-6
    )
    assert found.absolute.tolist() == [1.0, 1.0, 1.0, 1.0]
    assert found.over(np.array([0, 500, 1000])) == pytest.approx([1.0, 1.0])


def test_an_output_that_breaks_off_is_refused() -> None:
    table = step_table(SCHEDULE, "ddim", 4)
    with pytest.raises(CheckFailed, match="a sample became NaN or infinite when the network"):
        measure_importance(lambda sample, timestep: sample * float("nan"), LINEAR, Sampling(table, [0]))
