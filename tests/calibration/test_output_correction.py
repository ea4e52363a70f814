"""Output correction: the linear part of the error is found, refused where others do not confirm it, and kept."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qdm_calibration import output_correction as module
from qdm_calibration.output_correction import correct_output
from qdm_calibration.rows import run_rows
from qdm_calibration.simulate import simulate
from qdm_deploy.artifacts.plan import QuantizationPlan
from qdm_deploy.errors import InputError


def shifted(tiny: Any, name: str) -> QuantizationPlan:
    """A plan whose last INT8 layer has wrong weights; of both signs, as a GroupNorm follows.

    Its inputs come from a SiLU, so they are positive in the mean, and the error of the output is too.
    """
    plan = tiny.plan(name)
    last = plan.quantized[-1]
    wrong = np.where(np.arange(last.layer.out_channels) % 2, -8, 8).reshape(-1, *[1] * (last.codes.ndim - 1))
    codes = np.clip(last.codes + wrong, -127, 127).astype(np.int8)
    layers = tuple(replace(layer, weight_codes=codes) if layer is last else layer for layer in plan.layers)
    return replace(plan, layers=layers)


def outputs_of(tiny: Any, name: str, plan: QuantizationPlan) -> tuple[Any, Any, Any]:
    """Samples, float outputs and INT8 outputs of every row, without a learned variance."""
    network, calibration = tiny.checkpoint(name).unet, tiny.calibration(name)
    rows, channels = np.arange(len(calibration.timestep)), calibration.sample.shape[1]
    with torch.inference_mode():
        found = run_rows(simulate(network, plan, "tensorrt"), calibration, rows)[:, :channels]
        expected = run_rows(network, calibration, rows)[:, :channels]
    return calibration.sample, expected.double().numpy(), found.double().numpy()


class Skewed(torch.nn.Module):
    """A network whose output is off by what a correction describes."""

    def __init__(self, network: torch.nn.Module, shift: float, gain: float, share: float) -> None:
        super().__init__()
        self.network, self.shift, self.gain, self.share = network, shift, gain, share

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, **conditioning: torch.Tensor) -> torch.Tensor:
        output = self.network(sample, timestep, **conditioning)
        channels = sample.shape[1]
        output[:, :channels] *= 1 + self.gain
        output[:, :channels] += self.shift + self.share * sample
        return output


@pytest.mark.parametrize("name", ["labels", "variance"])
def test_what_is_linear_in_output_and_sample_is_found(tiny: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, calibration = tiny.checkpoint(name).unet, tiny.calibration(name)
    skewed = Skewed(network, 0.01, -0.02, 0.03)
    monkeypatch.setattr(module, "simulate", lambda *arguments, **options: skewed)
    table = correct_output(network, tiny.plan(name), calibration).output_correction
    assert table is not None
    outputs, channels = network.unet.conv_out.out_channels, calibration.sample.shape[1]
    assert (table.shape, table.dtype) == ((tiny.plan(name).timestep_edges[-1], 3, outputs), np.float32)
    assert (outputs > channels) == (name == "variance")
    assert not table[:, :, channels:].any()  # a learned variance is left alone
    np.testing.assert_allclose(table[:, 0, :channels], 0.01, atol=1e-4)
    np.testing.assert_allclose(table[:, 1, :channels], -0.02, atol=1e-4)
    np.testing.assert_allclose(table[:, 2, :channels], 0.03, atol=1e-4)


@pytest.mark.parametrize("name", ["labels", "variance"])
def test_a_shift_of_every_step_goes(tiny: Any, name: str) -> None:
    plan = shifted(tiny, name)
    corrected = correct_output(tiny.checkpoint(name).unet, plan, tiny.calibration(name))
    assert corrected.output_correction is not None
    timestep = tiny.calibration(name).timestep
    means = []
    for each in (plan, corrected):
        _, expected, found = outputs_of(tiny, name, each)
        errors = (found - expected).mean(axis=(1, 2, 3))
        means.append(np.linalg.norm([errors[timestep == t].mean() for t in np.unique(timestep)]))
    assert means[1] < 0.3 * means[0]


def test_noise_in_the_output_is_not_taken_for_a_gain(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # A fit on the noisy output would shrink it by the share of the noise, here a fifth.
    network, calibration = tiny.checkpoint("labels").unet, tiny.calibration("labels")
    generator = torch.Generator().manual_seed(0)

    def noisy(sample: torch.Tensor, timestep: torch.Tensor, **conditioning: torch.Tensor) -> torch.Tensor:
        output = network(sample, timestep, **conditioning)
        return output * 1.1 + output.std() * torch.randn(output.shape, generator=generator) / 2

    monkeypatch.setattr(module, "simulate", lambda *arguments, **options: noisy)
    table = correct_output(network, tiny.plan("labels"), calibration).output_correction
    assert table is not None
    sample, expected, _ = outputs_of(tiny, "labels", tiny.plan("labels"))
    gain, share = table[calibration.timestep][:, 1:, :, None, None].swapaxes(0, 1)
    effect = ((gain * expected + share * sample) * expected).mean() / (expected**2).mean()
    assert 0.07 < effect < 0.13


def test_a_table_that_other_rows_do_not_confirm_is_left_out(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    network, calibration = tiny.checkpoint("labels").unet, tiny.calibration("labels")
    signs = iter([1.0, -1.0, 1.0, 1.0, 1.0] * len(calibration.timestep))  # every fifth row judges, the second first

    def turning(sample: torch.Tensor, timestep: torch.Tensor, **conditioning: torch.Tensor) -> torch.Tensor:
        output = network(sample, timestep, **conditioning)
        return output + torch.tensor([next(signs) for _ in sample])[:, None, None, None] * 0.1

    monkeypatch.setattr(module, "simulate", lambda *arguments, **options: turning)
    assert correct_output(network, tiny.plan("labels"), calibration, rows=10).output_correction is None


def test_measured_twice_is_the_same(tiny: Any) -> None:
    network, calibration = tiny.checkpoint("labels").unet, tiny.calibration("labels")
    once = correct_output(network, shifted(tiny, "labels"), calibration)
    twice = correct_output(network, once, calibration)
    np.testing.assert_array_equal(once.output_correction, twice.output_correction)


def test_the_plan_keeps_its_table_on_disk(tiny: Any, tmp_path: Path) -> None:
    corrected = correct_output(tiny.checkpoint("labels").unet, shifted(tiny, "labels"), tiny.calibration("labels"))
    corrected.save(tmp_path)
    loaded = QuantizationPlan.load(tmp_path)
    np.testing.assert_array_equal(loaded.output_correction, corrected.output_correction)


def test_a_plan_without_int8_or_one_row_has_nothing_to_correct(tiny: Any) -> None:
    network, plan, whole = tiny.checkpoint("labels").unet, tiny.plan("labels"), tiny.calibration("labels")
    everything_float = replace(plan, layers=tuple(replace(layer, precision="float") for layer in plan.layers))
    assert correct_output(network, everything_float, whole).output_correction is None
    assert correct_output(network, shifted(tiny, "labels"), whole, rows=1).output_correction is None


def test_a_table_of_another_shape_is_refused(tiny: Any, tmp_path: Path) -> None:
    replace(tiny.plan("labels"), output_correction=np.zeros((1000, 1), dtype=np.float32)).save(tmp_path)
    with pytest.raises(InputError, match=r"has the shape \[1000, 1\], not \[timesteps, 3, outputs\]"):
        QuantizationPlan.load(tmp_path)
