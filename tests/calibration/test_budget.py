"""Which layers stay in float: by name, by rank and by noise per cost, and the plan that comes out."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from qdm_calibration.budget import check_choice, frontier, keep_float, needs_sensitivity, needs_times
from qdm_calibration.sensitivity import Sensitivity
from qdm_deploy.artifacts.plan import LayerPlan, QuantizationPlan
from qdm_deploy.artifacts.topology import Layer
from qdm_deploy.errors import InputError

NAMES = ("conv_in", "mid.conv1", "mid.conv2", "mid.to_out", "conv_out")


def plan() -> QuantizationPlan:
    layers = [LayerPlan(Layer(name, "linear", (4, 4), name, (4,), False), "int8", scale=1.0) for name in NAMES]
    never = LayerPlan(Layer("narrow", "linear", (1, 1), "narrow", (1,), False, float_reason="x"), "float", reason="x")
    return QuantizationPlan((*layers, never), np.array([0, 1000]), {"ranges": "mse"})


def sensitivity() -> Sensitivity:
    # Noise 10, 1, 2, 3, 4 at one timestep; the signal makes 20 of noise an SQNR of 20 dB.
    noise = np.array([[10.0], [1.0], [2.0], [3.0], [4.0]])
    return Sensitivity(
        NAMES, np.array([500]), noise, np.array([2000.0]), np.ones(1), np.array([500, 100, 100, 30, 270])
    )


def kept(result: QuantizationPlan) -> list[str]:
    return [item.name for item in result.layers if item.precision == "float" and item.name != "narrow"]


def test_names_and_patterns() -> None:
    assert kept(keep_float(plan(), "conv_out")) == ["conv_out"]
    result = keep_float(plan(), "conv_out, mid.conv?")
    assert kept(result) == ["mid.conv1", "mid.conv2", "conv_out"]
    assert result.layer("conv_out").reason == "kept in float: asked for by name"
    assert result.layer("narrow").reason == "x"
    assert result.layer("conv_in") == plan().layer("conv_in")
    assert result.options == {"ranges": "mse"}


def test_an_unknown_name_is_refused_with_close_ones() -> None:
    with pytest.raises(InputError, match=r"'mid.conv3' is no INT8 layer .*close to it: mid.conv2, mid.conv1"):
        keep_float(plan(), "mid.conv3")
    with pytest.raises(InputError, match=r"'xyz\*' is no INT8 layer to keep in float \(one of them is conv_in\)"):
        check_choice("conv_in,xyz*", plan().topology)
    with pytest.raises(InputError, match="'narrow' is no INT8 layer"):
        check_choice("narrow", plan().topology)
    check_choice("auto", plan().topology)
    check_choice("12.5%", plan().topology)
    check_choice("mid.*", plan().topology)


@pytest.mark.parametrize("choice", ["101%", "-1%", "many%", "nan%", "%"])
def test_a_percentage_that_is_none_is_refused(choice: str) -> None:
    with pytest.raises(InputError, match=f"'{choice}' of the INT8 cost cannot be kept in float; give a percentage"):
        check_choice(choice, plan().topology)


def test_percent_takes_as_much_noise_as_that_part_of_the_cost_can_remove() -> None:
    # Per cost: mid.to_out 0.1, conv_in and mid.conv2 0.02, conv_out 0.0148, mid.conv1 0.01; the whole costs 1000.
    result = keep_float(plan(), "40%", sensitivity())
    assert kept(result) == ["mid.conv2", "mid.to_out", "conv_out"]  # 400 of it; conv_in costs 500
    assert result.layer("mid.to_out").reason == "kept in float: adds 15% of the noise"
    assert kept(keep_float(plan(), "60%", sensitivity())) == ["conv_in", "mid.to_out"]
    assert kept(keep_float(plan(), "0%", sensitivity())) == []
    assert kept(keep_float(plan(), "100%", sensitivity())) == list(NAMES)


def test_none_keeps_the_plan() -> None:
    before = plan()
    assert keep_float(before, "none") is before
    check_choice("none", before.topology)


def test_auto_takes_bargains_and_what_a_target_needs() -> None:
    # A bargain: 30 of 1000 in cost, and so at most 15 % of the noise is 5 times that. A sixfold one needs 18 %.
    assert kept(keep_float(plan(), "auto", sensitivity(), min_sqnr_db=20)) == []
    cheap = replace(sensitivity(), macs=np.array([500, 100, 100, 24, 276]))
    assert kept(keep_float(plan(), "auto", cheap, min_sqnr_db=20)) == ["mid.to_out"]
    # Too much of the cost for a bargain, whatever it gives.
    loud = replace(cheap, noise=np.array([[1.0], [1.0], [1.0], [90.0], [1.0]]), macs=np.array([460, 100, 100, 41, 299]))
    assert kept(keep_float(plan(), "auto", loud, min_sqnr_db=-90)) == []
    # Towards a target, by noise per cost: conv_in costs half of the network and is passed over.
    assert kept(keep_float(plan(), "auto", sensitivity(), min_sqnr_db=20.5)) == ["mid.to_out"]
    assert kept(keep_float(plan(), "auto", sensitivity(), min_sqnr_db=90)) == ["mid.to_out"]
    limited = keep_float(plan(), "auto", sensitivity(), min_sqnr_db=90, max_float_share=0.2)
    assert kept(limited) == ["mid.conv2", "mid.to_out"]
    assert kept(keep_float(plan(), "auto", sensitivity(), min_sqnr_db=90, max_float_share=1)) == list(NAMES)


def test_a_layer_that_is_loud_at_the_worst_timestep_is_a_bargain_too() -> None:
    # At the second timestep, 10 dB worse, mid.conv1 makes two thirds of the noise; in the mean it is nothing much.
    noise = np.array([[10.0, 10.0], [0.1, 100.0], [30.0, 15.0], [40.0, 15.0], [50.0, 10.0]])
    signal, macs = np.array([20000.0, 2000.0]), np.array([500, 20, 100, 130, 250])
    found = replace(
        sensitivity(), timesteps=np.array([0, 500]), noise=noise, signal=signal, weights=np.array([9.0, 0.1])
    )
    found = replace(found, macs=macs)
    assert found.shares()["mid.conv1"] < 0.01
    assert found.worst_shares()["mid.conv1"] == pytest.approx(100 / 150)
    result = keep_float(plan(), "auto", found, min_sqnr_db=-90)
    assert kept(result) == ["mid.conv1"]
    assert (
        result.layer("mid.conv1").reason == "kept in float: adds less than 1% of the noise, 67% at the worst timestep"
    )


def test_a_measured_cost_replaces_the_multiply_accumulates() -> None:
    cost = dict.fromkeys(NAMES, 1.0)
    result = keep_float(plan(), "auto", sensitivity(), cost, min_sqnr_db=23, max_float_share=0.2)
    assert kept(result) == ["conv_in"]
    with pytest.raises(InputError, match=r"1 INT8 layers have no cost above 0 \(first: conv_out\)"):
        keep_float(plan(), "auto", sensitivity(), {**cost, "conv_out": 0.0})


# Milliseconds that a layer adds in float; INT8 makes mid.conv1 slower. A step takes 10.
EXTRA = {"conv_in": 4.0, "mid.conv1": -0.5, "mid.conv2": 0.3, "mid.to_out": 1.0, "conv_out": 0.6}


def test_a_percentage_of_the_time_is_kept_to() -> None:
    def within(choice: str) -> list[str]:
        return kept(keep_float(plan(), choice, sensitivity(), step_ms=10.0, extra_ms=EXTRA))

    # Noise per millisecond: mid.conv2 6.7, conv_out 6.7, mid.to_out 3, conv_in 2.5; mid.conv1 costs nothing.
    assert within("0%time") == []
    assert within("1%time") == ["mid.conv1"]
    assert within("9.1%time") == ["mid.conv1", "mid.conv2", "conv_out"]
    assert within("20%time") == ["mid.conv1", "mid.conv2", "mid.to_out", "conv_out"]
    assert within("100%time") == list(NAMES)
    with pytest.raises(ValueError, match="keeping '5%time' in float needs the times of the layers"):
        keep_float(plan(), "5%time", sensitivity())
    with pytest.raises(InputError, match=r"'101%time' of a step's time .* give a percentage from 0%time to 100%time"):
        check_choice("101%time", plan().topology)
    assert [needs_times(choice) for choice in ("5%time", "5%", "auto", "time")] == [True, False, False, False]


def test_the_frontier_knows_the_time_of_a_step() -> None:
    points = frontier(sensitivity(), step_ms=10.0, extra_ms=EXTRA)
    assert [point.step_ms for point in points] == pytest.approx([10.0, 14.0, 14.6, 15.6, 15.9])
    assert {point.step_ms for point in frontier(sensitivity())} == {None}


def test_what_needs_a_measurement() -> None:
    assert [needs_sensitivity(choice) for choice in ("auto", "5%", "none", "conv_in", "auto*")] == [True, True] + [
        False
    ] * 3
    with pytest.raises(ValueError, match="keeping '5%' in float needs the sensitivity"):
        keep_float(plan(), "5%")


def test_the_frontier_by_hand() -> None:
    points = frontier(sensitivity())
    assert [point.layer for point in points] == [None, "conv_in", "conv_out", "mid.to_out", "mid.conv2"]
    assert [point.int8_share for point in points] == pytest.approx([1.0, 0.5, 0.23, 0.2, 0.1])
    assert [point.noise for point in points] == pytest.approx([20, 10, 6, 3, 1])
    assert points[0].sqnr_db == pytest.approx(20)
    assert points[-1].sqnr_db == pytest.approx(10 * np.log10(2000))


def test_a_small_share_is_not_written_as_none() -> None:
    noise = np.array([[1000.0], [1.0], [1.0], [1.0], [1.0]])
    result = keep_float(plan(), "100%", replace(sensitivity(), noise=noise))
    assert result.layer("mid.conv1").reason == "kept in float: adds less than 1% of the noise"


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "tensorrt"])
def test_some_layers_of_a_shared_input_can_stay_float(tiny: Any, target: Any) -> None:
    from qdm_export.targets import emit

    full = tiny.plan("labels")
    group = next(layers for layers in full.topology.groups().values() if len(layers) > 1)
    result = keep_float(full, group[0].name)  # the first, whose name the group has
    graph = emit(tiny.float_graph("labels"), result, target).model
    names = {node.name for node in graph.graph if node.name}
    assert f"{group[0].name}/dequantize" not in names
    assert f"{group[1].name}/dequantize" in names
    assert f"{group[1].name}/quantize" in names
