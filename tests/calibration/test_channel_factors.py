"""The search for per-channel factors, on one convolution whose best factors are known."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qdm_calibration.channel_factors import free_inputs, search_channel_factors
from qdm_calibration.plan import plan_scales
from qdm_calibration.simulate import quantized_layer
from qdm_calibration.statistics import collect_scaled_inputs, collect_statistics
from qdm_deploy.artifacts.calibration_set import CalibrationSet
from qdm_deploy.artifacts.topology import Layer, Topology
from tests.recipes import recipe_of

CHANNELS = 16


class Net(nn.Module):
    """One convolution behind fixed channel gains."""

    def __init__(self, gains: Tensor) -> None:
        super().__init__()
        self.register_buffer("gains", gains.reshape(1, -1, 1, 1))
        self.unet = nn.ModuleDict({"conv": nn.Conv2d(CHANNELS, 16, 3, padding=1)})

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        result: Tensor = self.unet["conv"](sample * self.gains)
        return result


def layer(branches: tuple[int, ...] = (CHANNELS,)) -> Layer:
    return Layer(
        "conv", "conv", (16, CHANNELS, 3, 3), "conv", branches, False, (1, 1), (1, 1, 1, 1), (8, 8)
    )  # fmt: skip


def rows(count: int = 24, *, uniform: bool = False) -> CalibrationSet:
    rng = np.random.default_rng(3)
    shape = (count, CHANNELS, 8, 8)
    return CalibrationSet(
        sample=(rng.integers(-9, 10, shape) / 9 if uniform else rng.normal(size=shape)).astype(np.float32),
        timestep=np.repeat(np.arange(4) * 250 + 100, count // 4).astype(np.int64),
        step=np.repeat(np.arange(4), count // 4).astype(np.int64),
        seed=np.arange(count, dtype=np.int64),
        conditioning={},
        provenance={},
    )


def searched(gains: Tensor, topology: Topology, *, uniform: bool = False, **options: Any) -> Any:
    torch.manual_seed(0)
    net = Net(gains).eval()
    calibration = rows(uniform=uniform)
    statistics = collect_statistics(net, topology, calibration, 1000)
    found = search_channel_factors(net, topology, statistics, calibration, recipe_of(), **options)
    return net, calibration, statistics, found["conv"]


def test_uneven_channels_get_factors_and_the_layer_errs_less() -> None:
    topology = Topology((layer(),))
    gains = torch.logspace(-1.3, 1.3, CHANNELS)
    net, calibration, statistics, found = searched(gains, topology)
    assert found.inverse_k is not None
    assert found.gain_db > 1
    assert found.note.startswith("alpha")
    assert found.inverse_k.min() >= 1
    np.testing.assert_array_equal(found.inverse_k, found.inverse_k.astype(np.float16).astype(np.float32))
    options = recipe_of(concat_scales="none", step_bins=1)
    plain = plan_scales(net, topology, statistics, options)
    scaled = collect_scaled_inputs(net, topology, calibration, statistics.timestep_edges, {"conv": found.inverse_k})
    factored = plan_scales(net, topology, replace(statistics, inputs=scaled), options, factors={"conv": found})
    fresh = torch.randn(4, CHANNELS, 8, 8) * net.gains
    conv = net.unet["conv"]
    with torch.inference_mode():
        errors = [
            float((quantized_layer(conv, plan.layers[0], "openvino")(fresh) - conv(fresh)).square().mean())
            for plan in (plain, factored)
        ]
    assert 10 * np.log10(errors[0] / errors[1]) > 1  # on inputs nobody searched on
    assert factored.layers[0].notes["k"] == found.note


def test_even_channels_are_left_alone() -> None:
    # Uniform values: every channel reaches the same largest magnitude, so there is nothing to even out.
    *_, found = searched(torch.ones(CHANNELS), Topology((layer(),)), uniform=True)
    assert found.inverse_k is None
    assert found.note.startswith("left out: measured on the layer's output, alpha 0.25 ")


def test_branches_are_offered_their_fold_and_channels_can_be_switched_off() -> None:
    gains = torch.cat([torch.full((8,), 0.02), torch.ones(8)])
    *_, found = searched(gains, Topology((layer((8, 8)),)), channels=())
    assert "branch fold" in found.note
    assert "alpha" not in found.note


def test_nothing_to_offer_is_said() -> None:
    *_, found = searched(torch.ones(CHANNELS), Topology((layer(),)), channels=())
    assert (found.inverse_k, found.gain_db) == (None, 0.0)
    assert found.note == "none: this input offers no factor"


def test_scaled_statistics_are_of_x_over_k() -> None:
    topology = Topology((layer(),))
    torch.manual_seed(0)
    net, calibration = Net(torch.ones(CHANNELS)).eval(), rows()
    plain = collect_statistics(net, topology, calibration, 1000)
    factor = np.linspace(1, 4, CHANNELS).astype(np.float32)
    scaled = collect_scaled_inputs(net, topology, calibration, plain.timestep_edges, {"conv": factor})["conv"]
    np.testing.assert_allclose(scaled.channel_max, plain.inputs["conv"].channel_max * factor, rtol=1e-6)
    assert scaled.counts.sum() == plain.inputs["conv"].counts.sum()
    assert scaled.counts.shape[1] == 1


@pytest.mark.parametrize("rows_asked", [3, 1000])
def test_any_number_of_rows_will_do(rows_asked: int) -> None:
    *_, found = searched(torch.logspace(-1.3, 1.3, CHANNELS), Topology((layer(),)), rows=rows_asked)
    assert found.inverse_k is not None


def test_factors_that_weights_take_up_are_powers_of_two() -> None:
    gains = torch.logspace(-1.3, 1.3, CHANNELS)
    *_, anywhere = searched(gains, Topology((replace(layer(), absorber="norm"),)))
    *_, weights = searched(gains, Topology((replace(layer(), absorber="weights"),)))
    assert "in the normalization before it" in anywhere.note
    assert "powers of two, in the weights before it" in weights.note
    fractions, _ = np.frexp(anywhere.inverse_k)
    assert (fractions != 0.5).any()
    fractions, _ = np.frexp(weights.inverse_k)
    assert (fractions == 0.5).all()
    assert weights.inverse_k.min() >= 1
    assert weights.gain_db > 1  # rounding k to a power of two costs little


def test_free_inputs_depend_on_the_targets() -> None:
    first = replace(layer(), normalized=True)
    others = {
        "raw": replace(first, normalized=False),
        "norm": replace(first, absorber="norm"),
        "weights": replace(first, normalized=False, absorber="weights"),
    }
    named = [replace(item, name=name, input_group=name) for name, item in {"conv": first, **others}.items()]
    linear = Layer("linear", "linear", (8, 8), "linear", (8,), True)
    raw_linear = replace(linear, name="raw linear", input_group="raw linear", normalized=False)
    topology = Topology((*named, linear, raw_linear))
    absorbed = {"norm", "weights"}
    assert free_inputs(topology, ["onnxruntime", "openvino"]) == absorbed | {"conv", "raw"}
    assert free_inputs(topology, ["tensorrt"]) == absorbed | {"raw", "raw linear"}
    assert free_inputs(topology, ["onnxruntime", "tensorrt"]) == absorbed | {"raw"}


def test_only_the_inputs_named_are_offered_factors() -> None:
    gains = torch.logspace(-1.3, 1.3, CHANNELS)
    *_, offered = searched(gains, Topology((layer(),)), channels=["conv"])
    *_, not_offered = searched(gains, Topology((layer(),)), channels=["another"])
    assert offered.inverse_k is not None
    assert not_offered.inverse_k is None
