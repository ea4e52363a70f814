"""Bias correction: it removes the mean error, only where that helps, and stays in the plan."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qdm_calibration.bias_correction import correct_biases
from qdm_calibration.reconstruct import held_out
from qdm_calibration.rows import chosen_rows, run_rows
from qdm_calibration.simulate import quantized_layer
from qdm_deploy.artifacts.calibration_set import CalibrationSet
from qdm_deploy.artifacts.plan import LayerPlan, QuantizationPlan
from qdm_deploy.errors import InputError


@pytest.fixture(scope="module")
def corrected(tiny: Any) -> QuantizationPlan:
    return correct_biases(
        tiny.checkpoint("labels").unet, tiny.plan("labels", weight_bits=4), tiny.calibration("labels")
    )


def layer_errors(tiny: Any, plans: list[LayerPlan], rows: Any) -> list[np.ndarray[Any, Any]]:
    """Error of one layer under several plans on the float network's input, [B, O, positions] float64 each."""
    network, calibration = tiny.checkpoint("labels").unet, tiny.calibration("labels")
    bins = torch.from_numpy(tiny.plan("labels", weight_bits=4).bin_of_timestep()[calibration.timestep[rows]])
    module = network.get_submodule(f"unet.{plans[0].name}")
    seen = []
    handle = module.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    with torch.inference_mode():
        run_rows(network, calibration, rows)
        handle.remove()
        errors = []
        for plan in plans:
            layer = quantized_layer(module, plan, "tensorrt")
            layer.time_bin = bins
            error = (layer(seen[0][0]) - seen[0][1]).double()
            axis = 1 if plan.layer.kind == "conv" else -1
            errors.append(error.movedim(axis, 1).flatten(2).numpy())
    return errors


def test_the_mean_error_of_every_channel_goes_and_the_note_says_what_it_was_worth(
    tiny: Any, corrected: QuantizationPlan
) -> None:
    calibration = tiny.calibration("labels")
    picked = chosen_rows(calibration.timestep, 120)
    train, judges = held_out(len(picked))
    kept = [layer for layer in corrected.quantized if layer.bias_correction is not None]
    assert len(kept) > len(corrected.quantized) // 2
    for layer in kept[:6]:
        assert layer.bias_correction is not None
        assert layer.bias_correction.dtype == np.float32
        plain = replace(layer, bias_correction=None)
        before, after = layer_errors(tiny, [plain, layer], picked[train])
        assert np.abs(after.mean(axis=(0, 2))).max() < 1e-3 * np.abs(before.mean(axis=(0, 2))).max()
        before, after = layer_errors(tiny, [plain, layer], picked[judges])
        worth = 10 * np.log10((before**2).sum() / (after**2).sum())
        assert worth > 0
        assert layer.notes["b"].endswith(f"the layer's error on held-out rows fell by {worth:.2f} dB")


def test_a_correction_that_other_rows_do_not_confirm_is_left_out(tiny: Any) -> None:
    # Two rows: the mean of one says little about the other.
    plan = tiny.plan("labels")
    network, calibration = tiny.checkpoint("labels").unet, tiny.calibration("labels")
    few = correct_biases(network, plan, calibration, rows=2)
    left = [layer for layer in few.quantized if layer.bias_correction is None]
    assert left
    for layer in left:
        assert layer.notes["b"].startswith("left as it is: on held-out rows the corrected layer errs")


def test_corrections_measured_twice_are_the_same(tiny: Any, corrected: QuantizationPlan) -> None:
    again = correct_biases(tiny.checkpoint("labels").unet, corrected, tiny.calibration("labels"))
    for before, after in zip(corrected.quantized, again.quantized, strict=True):
        np.testing.assert_array_equal(before.bias_correction, after.bias_correction)


def test_the_plan_keeps_its_corrections_on_disk(corrected: QuantizationPlan, tmp_path: Path) -> None:
    corrected.save(tmp_path)
    loaded = QuantizationPlan.load(tmp_path)
    assert loaded.summary()["bias_corrections"] == corrected.summary()["bias_corrections"] > 0
    for before, after in zip(corrected.layers, loaded.layers, strict=True):
        np.testing.assert_array_equal(before.bias_correction, after.bias_correction)


def test_one_row_is_too_few(tiny: Any) -> None:
    whole = tiny.calibration("labels")
    conditioning = {name: value[:1] for name, value in whole.conditioning.items()}
    one = CalibrationSet(whole.sample[:1], whole.timestep[:1], whole.seed[:1], whole.step[:1], conditioning)
    with pytest.raises(InputError, match="bias correction needs at least 2 calibration rows"):
        correct_biases(tiny.checkpoint("labels").unet, tiny.plan("labels"), one)
