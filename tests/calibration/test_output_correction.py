"""Output correction: the mean error at each timestep is found, refused where others do not confirm it, and kept."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qdm_calibration.output_correction import correct_output
from qdm_calibration.rows import run_rows
from qdm_calibration.simulate import simulate
from qdm_deploy.artifacts.calibration_set import CalibrationSet
from qdm_deploy.artifacts.plan import QuantizationPlan


def shifted(tiny: Any, name: str) -> QuantizationPlan:
    """A plan with wrong biases in its last INT8 layer; of both signs, as a GroupNorm follows."""
    plan = tiny.plan(name)
    last = plan.quantized[-1]
    wrong = np.where(np.arange(last.layer.out_channels) % 2, -0.1, 0.1).astype(np.float32)
    layers = tuple(replace(layer, bias_correction=wrong) if layer is last else layer for layer in plan.layers)
    return replace(plan, layers=layers)


def mean_errors(tiny: Any, name: str, plan: QuantizationPlan) -> Any:
    """Mean error of every row and channel, [N, C]."""
    network, calibration = tiny.checkpoint(name).unet, tiny.calibration(name)
    rows = np.arange(len(calibration.timestep))
    with torch.inference_mode():
        error = run_rows(simulate(network, plan, "tensorrt"), calibration, rows) - run_rows(network, calibration, rows)
    return error.double().flatten(2).mean(dim=2).numpy()


@pytest.mark.parametrize("name", ["labels", "variance"])
def test_a_shift_of_every_step_goes(tiny: Any, name: str) -> None:
    plan = shifted(tiny, name)
    corrected = correct_output(tiny.checkpoint(name).unet, plan, tiny.calibration(name))
    table = corrected.output_correction
    assert table is not None
    assert table.dtype == np.float32
    network, channels = tiny.checkpoint(name).unet, tiny.calibration(name).sample.shape[1]
    outputs = network.unet.conv_out.out_channels
    assert table.shape == (plan.timestep_edges[-1], outputs)
    assert (outputs > channels) == (name == "variance")
    assert not table[:, channels:].any()  # a learned variance is left alone
    timestep = tiny.calibration(name).timestep
    at = [timestep == each for each in np.unique(timestep)]
    errors = (mean_errors(tiny, name, p)[:, :channels] for p in (plan, corrected))
    before, after = ([error[rows].mean() for rows in at] for error in errors)
    assert np.linalg.norm(after) < 0.3 * np.linalg.norm(before)


def test_a_table_that_other_rows_do_not_confirm_is_left_out(tiny: Any) -> None:
    # Of two rows the earlier timestep measures and the later one judges.
    plan, whole = tiny.plan("labels"), tiny.calibration("labels")
    errors = mean_errors(tiny, "labels", plan)
    left = {}
    for measured, judge in np.argwhere(whole.timestep[:, None] < whole.timestep[None, :]):
        worth = (errors[judge] ** 2).sum() - ((errors[judge] - errors[measured]) ** 2).sum()
        left.setdefault(bool(worth > 0), (measured, judge))
    assert set(left) == {True, False}
    for confirmed, pair in left.items():
        rows = np.array(pair)
        conditioning = {name: value[rows] for name, value in whole.conditioning.items()}
        two = CalibrationSet(whole.sample[rows], whole.timestep[rows], whole.seed[rows], whole.step[rows], conditioning)
        table = correct_output(tiny.checkpoint("labels").unet, plan, two).output_correction
        assert (table is not None) == confirmed
        if table is not None:
            np.testing.assert_allclose(table, np.broadcast_to(errors[pair[0]], table.shape), atol=1e-6)


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
