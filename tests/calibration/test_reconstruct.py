"""Learned rounding: it helps, it never hurts, it is the same twice, and it goes on where it stopped."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qdm_calibration.adaround import RoundedLayer
from qdm_calibration.blocks import blocks_of, run_until
from qdm_calibration.reconstruct import ReconstructOptions, reconstruct
from qdm_calibration.simulate import simulate
from qdm_deploy.artifacts.calibration_set import CalibrationSet
from qdm_deploy.artifacts.plan import QuantizationPlan
from qdm_deploy.errors import CalibrationError, InputError

QUICK = ReconstructOptions(iterations=40, rows=20, batch_size=8, learning_rate=3e-2)


def run(network: nn.Module, calibration: CalibrationSet) -> Tensor:
    conditioning = {name: torch.from_numpy(value) for name, value in calibration.conditioning.items()}
    with torch.inference_mode():
        output: Tensor = network(
            torch.from_numpy(calibration.sample), torch.from_numpy(calibration.timestep), **conditioning
        )
    return output


def sqnr_db(reference: Tensor, approximation: Tensor) -> float:
    return float(10 * torch.log10(reference.square().sum() / (reference - approximation).square().sum()))


@pytest.fixture(scope="module")
def four_bits(tiny: Any) -> QuantizationPlan:
    plan: QuantizationPlan = tiny.plan("labels", bits=4)
    return plan


@pytest.fixture(scope="module")
def learned(tiny: Any, four_bits: QuantizationPlan) -> QuantizationPlan:
    return reconstruct(tiny.checkpoint("labels").unet, four_bits, tiny.calibration("labels"), QUICK)


def codes_of(plan: QuantizationPlan) -> bytes:
    return b"".join(layer.codes.tobytes() for layer in plan.quantized)


def test_learned_rounding_brings_the_output_closer(
    tiny: Any, four_bits: QuantizationPlan, learned: QuantizationPlan
) -> None:
    network, calibration = tiny.checkpoint("labels").unet, tiny.calibration("labels")
    reference = run(network, calibration)
    before, after = (
        sqnr_db(reference, run(simulate(network, plan, "tensorrt"), calibration)) for plan in (four_bits, learned)
    )
    assert after > before + 1


def test_only_the_codes_change_and_by_one_step_at_most(four_bits: QuantizationPlan, learned: QuantizationPlan) -> None:
    for before, after in zip(four_bits.quantized, learned.quantized, strict=True):
        assert after.codes.dtype == np.int8
        assert int(np.abs(after.codes.astype(int)).max()) <= 7
        assert int(np.abs(after.codes.astype(int) - before.codes).max()) <= 1
        np.testing.assert_array_equal(after.weight_scales, before.weight_scales)
        assert after.weight_sqnr_db is not None
        assert before.weight_sqnr_db is not None
        assert after.weight_sqnr_db <= before.weight_sqnr_db + 1e-3  # nearest is the best for the weight itself
        assert "held-out error" in after.notes["w"]
    assert codes_of(four_bits) != codes_of(learned)


def test_a_block_that_gains_nothing_keeps_nearest_rounding(tiny: Any, four_bits: QuantizationPlan) -> None:
    # One step of a huge learning rate throws every weight to the wrong side.
    options = ReconstructOptions(iterations=1, rows=10, batch_size=1, learning_rate=1e3)
    plan = reconstruct(tiny.checkpoint("labels").unet, four_bits, tiny.calibration("labels"), options)
    kept = [layer for layer in plan.quantized if layer.notes["w"].startswith("rounded to nearest")]
    assert kept
    for layer in kept:
        np.testing.assert_array_equal(layer.codes, four_bits.layer(layer.name).codes)


def test_a_second_run_takes_over_finished_blocks_and_equals_one_in_one_go(
    tiny: Any, four_bits: QuantizationPlan, learned: QuantizationPlan, tmp_path: Path
) -> None:
    network, calibration = tiny.checkpoint("labels").unet, tiny.calibration("labels")
    options = ReconstructOptions(**{**vars(QUICK), "folder": tmp_path})
    first = reconstruct(network, four_bits, calibration, options)
    assert codes_of(first) == codes_of(learned)
    files = sorted(tmp_path.iterdir())
    assert len(files) == len(blocks_of(network, four_bits))
    stamps = {path: path.stat().st_mtime_ns for path in files}
    files[0].unlink()
    files[1].write_bytes(b"cut short")
    again = reconstruct(network, four_bits, calibration, options)
    assert codes_of(again) == codes_of(learned)
    assert [layer.notes for layer in again.quantized] == [layer.notes for layer in first.quantized]
    assert {path for path in files if path.stat().st_mtime_ns != stamps[path]} == set(files[:2])


def test_blocks_follow_the_order_of_execution(tiny: Any, four_bits: QuantizationPlan) -> None:
    blocks = blocks_of(tiny.checkpoint("labels").unet, four_bits)
    assert [layer.name for block in blocks for layer in block.layers] == [layer.name for layer in four_bits.quantized]
    names = [block.name for block in blocks]
    assert names.index("mid_block.resnets.0") < names.index("up_blocks.0.resnets.0")
    (resnet,) = [block for block in blocks if block.name == "up_blocks.0.resnets.0"]
    leaves = {layer.name.rpartition(".")[2] for layer in resnet.layers}
    assert {"conv1", "conv2", "conv_shortcut"} <= leaves


def test_every_layer_may_be_a_unit_of_its_own(tiny: Any, four_bits: QuantizationPlan) -> None:
    network, calibration = tiny.checkpoint("labels").unet, tiny.calibration("labels")
    units = blocks_of(network, four_bits, unit="layer")
    assert [block.name for block in units] == [layer.name for layer in four_bits.quantized]
    plan = reconstruct(network, four_bits, calibration, ReconstructOptions(**{**vars(QUICK), "unit": "layer"}))
    reference = run(network, calibration)
    before, after = (
        sqnr_db(reference, run(simulate(network, item, "tensorrt"), calibration)) for item in (four_bits, plan)
    )
    assert after > before + 1
    for layer in plan.quantized:
        assert f"the held-out error of {layer.name} " in layer.notes["w"]


@pytest.mark.parametrize("inputs", [False, True])
def test_a_rounded_layer_computes_what_the_simulation_computes(tiny: Any, inputs: bool) -> None:
    from qdm_calibration.simulate import quantized_layer

    plan = tiny.plan("labels")
    network = tiny.checkpoint("labels").unet
    layer = next(item for item in plan.quantized if item.inverse_k is not None and item.inverse_r is not None)
    module = network.get_submodule(f"unet.{layer.name}")
    torch.manual_seed(0)
    x = torch.randn(3, layer.layer.in_channels, *(layer.layer.spatial or ())) * layer.scale * 30
    simulated, soft = quantized_layer(module, layer, "openvino"), RoundedLayer(module, layer)
    simulated.time_bin = soft.time_bin = torch.tensor([0, 1, 2])
    soft.quantize_input = inputs
    decibels = sqnr_db(simulated(x), soft(x))
    assert decibels > 90 if inputs else 20 < decibels < 60


def test_soft_rounding_starts_at_the_float_weight(tiny: Any) -> None:
    plan = tiny.plan("labels").quantized[0]
    layer = RoundedLayer(tiny.checkpoint("labels").unet.get_submodule(f"unet.{plan.name}"), plan)
    layer.begin()
    torch.testing.assert_close(layer.choice(), layer.steps - layer.steps.floor(), atol=1e-5, rtol=0)
    layer.end()
    assert int((layer.codes - torch.from_numpy(plan.codes)).abs().max()) == 0  # alpha >= 0 is h >= 0.5: nearest
    with pytest.raises(ValueError, match=f"the rounding of {plan.name} is not soft"):
        layer.choice()


def test_a_module_that_is_never_reached_is_named(tiny: Any) -> None:
    network = nn.Module()
    network.unet = nn.Sequential(nn.Linear(1, 1))
    network.forward = lambda sample, timestep, **conditioning: sample  # type: ignore[method-assign]
    with pytest.raises(CalibrationError, match=r"^0 is never reached"):
        run_until(network, "0", tiny.calibration("rgb"), np.arange(2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": 0}, "0 iterations per block were asked for; allowed are 1 to 100000"),
        ({"unit": "network"}, "unit of reconstruction 'network' is not known; choose 'block' or 'layer'"),
        ({"rows": 1}, "1 rows in batches of 16 were asked for"),
        ({"batch_size": 0}, "160 rows in batches of 0 were asked for"),
        ({"learning_rate": 0.0}, "learning rate 0.0 must be positive"),
        ({"regularizer": -1.0}, "regularizer -1.0 not negative"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ReconstructOptions(**options)


def test_one_row_is_too_few(tiny: Any, four_bits: QuantizationPlan) -> None:
    whole = tiny.calibration("labels")
    conditioning = {name: value[:1] for name, value in whole.conditioning.items()}
    one = CalibrationSet(whole.sample[:1], whole.timestep[:1], whole.seed[:1], whole.step[:1], conditioning)
    with pytest.raises(InputError, match="the calibration set has one row; reconstruction needs at least 2"):
        reconstruct(tiny.checkpoint("labels").unet, four_bits, one)
