"""One layer at a time: powers that add up, weights, the right rows, and a network that is left alone."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from qdm_calibration.rows import chosen_rows
from qdm_calibration.sensitivity import Sensitivity, measure_sensitivity
from qdm_calibration.simulate import simulate
from qdm_deploy.artifacts.plan import LayerPlan
from qdm_deploy.errors import InputError


@pytest.fixture(scope="module")
def measured(tiny: Any) -> Sensitivity:
    return measure_sensitivity(tiny.checkpoint("labels").unet, tiny.plan("labels"), tiny.calibration("labels"), rows=12)


def output_noise(tiny: Any, plan: Any, rows: Any) -> Any:
    """Mean squared error of each row under ``plan``, and the mean square of the float output."""
    data, network = tiny.calibration("labels"), tiny.checkpoint("labels").unet
    conditioning = {name: torch.from_numpy(values[rows]) for name, values in data.conditioning.items()}
    inputs = torch.from_numpy(data.sample[rows]), torch.from_numpy(data.timestep[rows])
    with torch.inference_mode():
        expected = network(*inputs, **conditioning).double()
        found = simulate(network, plan, "onnxruntime")(*inputs, **conditioning).double()
    return [(values**2).flatten(1).mean(1).numpy() for values in (found - expected, expected)]


def test_the_powers_of_single_layers_add_up_to_the_noise_of_the_plan(tiny: Any, measured: Sensitivity) -> None:
    rows = chosen_rows(tiny.calibration("labels").timestep, 12, last_step=True)
    noise, signal = output_noise(tiny, tiny.plan("labels"), rows)
    order = np.argsort(tiny.calibration("labels").timestep[rows])
    np.testing.assert_allclose(measured.signal, signal[order], rtol=1e-5)
    difference = 10 * np.log10(measured.noise.sum(axis=0) / noise[order])
    assert np.abs(difference).max() < 5
    assert abs(difference.mean()) < 2
    predicted = measured.sqnr_db()
    assert predicted is not None
    assert abs(predicted - np.mean(10 * np.log10(signal / noise))) < 2


def test_a_layers_noise_is_that_of_a_plan_with_only_this_layer(tiny: Any, measured: Sensitivity) -> None:
    plan, rows = tiny.plan("labels"), chosen_rows(tiny.calibration("labels").timestep, 12, last_step=True)
    chosen = next(item for item in plan.quantized if item.inverse_r is not None)
    alone = tuple(
        item if item.name == chosen.name else LayerPlan(item.layer, "float", reason="test") for item in plan.layers
    )
    noise, _ = output_noise(tiny, replace(plan, layers=alone), rows)
    order = np.argsort(tiny.calibration("labels").timestep[rows])
    np.testing.assert_allclose(measured.noise[measured.layers.index(chosen.name)], noise[order], rtol=1e-6)


def test_multiply_accumulates_follow_from_the_shapes(tiny: Any, measured: Sensitivity) -> None:
    for name, macs in zip(measured.layers, measured.macs.tolist(), strict=True):
        layer = tiny.topology("labels").layer(name)
        if layer.spatial is not None:
            size = [
                (layer.spatial[i] + layer.pads[i] + layer.pads[2 + i] - layer.weight_shape[2 + i]) // layer.strides[i]
                + 1
                for i in (0, 1)
            ]
            assert macs == np.prod(layer.weight_shape) * np.prod(size), name
        elif ".attentions." in name:
            assert macs == np.prod(layer.weight_shape) * 25, name  # 5 x 5 positions on the lower level


def test_the_network_is_left_as_it_was(tiny: Any) -> None:
    network = tiny.checkpoint("rgb").unet
    before = [(name, type(module), len(module._forward_hooks)) for name, module in network.named_modules()]
    measure_sensitivity(network, tiny.plan("rgb"), tiny.calibration("rgb"), rows=2)
    assert [(name, type(module), len(module._forward_hooks)) for name, module in network.named_modules()] == before


def by_hand(**changes: Any) -> Sensitivity:
    values = {
        "layers": ("a", "b", "c"),
        "timesteps": np.array([10, 500]),
        "noise": np.array([[1.0, 0.0], [0.0, 3.0], [1.0, 1.0]]),
        "signal": np.array([1.0, 100.0]),
        "weights": np.ones(2),
        "macs": np.array([10, 20, 70]),
    }
    return Sensitivity(**{**values, **changes})


def test_means_shares_and_ranks_by_hand() -> None:
    found = by_hand()
    assert found.mean_noise.tolist() == [0.5, 1.5, 1.0]
    assert found.ranked() == ("b", "c", "a")
    assert found.shares() == pytest.approx({"a": 1 / 6, "b": 0.5, "c": 1 / 3})
    first = found.weighted(np.array([1.0, 0.0]))
    assert first.ranked() == ("a", "c", "b")
    # At the worst timestep, the first, a makes half of the noise; without a and b, c makes all of it everywhere.
    assert found.worst_shares() == pytest.approx({"a": 0.5, "b": 0.0, "c": 0.5})
    assert found.without({"a"}).worst_shares() == pytest.approx({"b": 0.0, "c": 1.0})
    assert found.without({"a", "b"}).macs.tolist() == [70]
    # Relative to a signal of 1 and 100, the noise of the first timestep counts a hundredfold.
    assert found.relative().ranked() == ("c", "a", "b")
    # Relative to all the noise, 2 and 4, both timesteps count alike: 1/2, 3/4 and 1/2 + 1/4 of it.
    assert found.balanced().shares() == pytest.approx({"a": 0.25, "b": 0.375, "c": 0.375})
    # That is what halving a layer's noise power changes in the mean SQNR, for small changes.
    less = by_hand(noise=by_hand().noise * np.array([[1.0], [1.0 - 1e-6], [1.0]]))
    assert less.sqnr_db() - found.sqnr_db() == pytest.approx(0.375 * 1e-6 * 10 / np.log(10), rel=1e-3)
    assert by_hand(noise=np.zeros((3, 2))).balanced().shares() == {"a": 0.0, "b": 0.0, "c": 0.0}
    assert found.sqnr_db() == pytest.approx((10 * np.log10(1 / 2) + 10 * np.log10(100 / 4)) / 2)
    assert found.sqnr_db({"a", "b"}) == pytest.approx(10.0)
    assert found.sqnr_db({"a", "b", "c"}) is None
    assert by_hand(noise=np.zeros((3, 2))).shares() == {"a": 0.0, "b": 0.0, "c": 0.0}


@pytest.mark.parametrize("weights", [[1.0], [0.0, 0.0], [-1.0, 2.0]])
def test_weights_that_do_not_fit_are_refused(weights: list[float]) -> None:
    with pytest.raises(InputError, match=rf"2 timestep weights are needed.* given: \[{weights[0]}"):
        by_hand().weighted(np.array(weights))


def test_no_rows_are_refused(tiny: Any) -> None:
    with pytest.raises(InputError, match="0 sensitivity rows were asked for; at least 1"):
        measure_sensitivity(tiny.checkpoint("rgb").unet, tiny.plan("rgb"), tiny.calibration("rgb"), rows=0)


def test_a_plan_without_int8_is_refused(tiny: Any) -> None:
    plan = tiny.plan("rgb")
    floats = replace(plan, layers=tuple(LayerPlan(item.layer, "float", reason="test") for item in plan.layers))
    with pytest.raises(InputError, match="the plan has no INT8 layer"):
        measure_sensitivity(tiny.checkpoint("rgb").unet, floats, tiny.calibration("rgb"))
