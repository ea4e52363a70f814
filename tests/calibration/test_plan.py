"""Decisions: each factor on and off, exact folding, edges, reasons, and the saved plan."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from qdm_calibration.plan import plan_scales
from qdm_deploy.artifacts.plan import LayerPlan, QuantizationPlan
from qdm_deploy.artifacts.statistics import HISTOGRAM_BINS, ActivationStatistics, TensorStatistics
from qdm_deploy.artifacts.topology import Layer, Topology
from qdm_deploy.errors import InputError
from tests.recipes import recipe_of

EDGES = np.array([0, 250, 500, 750, 1000])


def tensor(*ranges: tuple[float, ...], one_sided: bool = False, widths: tuple[int, ...] = (16,)) -> TensorStatistics:
    """Uniform data: ``ranges[m][g]`` is the largest magnitude in time bin m and branch g."""
    counts = np.zeros((len(ranges), len(widths), HISTOGRAM_BINS), dtype=np.int64)
    exponents = np.zeros((len(ranges), len(widths)), dtype=np.int64)
    for m, row in enumerate(ranges):
        for g, amax in enumerate(row):
            e = int(np.ceil(np.log2(amax)))
            exponents[m, g] = e
            x = np.linspace(0 if one_sided else -amax, amax, 20_001) * 0.9999
            counts[m, g] = np.histogram(x, HISTOGRAM_BINS, (-(2.0**e), 2.0**e))[0]
    channels = np.zeros((len(ranges), sum(widths)), dtype=np.float32)
    return TensorStatistics(counts, exponents, channels - 1, channels + 1)


def conv(name: str = "conv", branches: tuple[int, ...] = (16,), **changes: Any) -> Layer:
    values = {"weight_shape": (16, sum(branches), 3, 3), "input_group": name, "normalized": False, **changes}
    return Layer(name, "conv", branches=branches, strides=(1, 1), pads=(1, 1, 1, 1), spatial=(8, 8), **values)


def network(*layers: Layer) -> nn.Module:
    torch.manual_seed(0)
    root = nn.Module()
    root.unet = nn.Module()
    for layer in layers:
        shape = layer.weight_shape
        setattr(
            root.unet,
            layer.name,
            nn.Conv2d(shape[1], shape[0], shape[2:]) if layer.kind == "conv" else nn.Linear(shape[1], shape[0]),
        )
    return root


def planned(layer: Layer, data: TensorStatistics, **options: Any) -> QuantizationPlan:
    out = tensor(*[(3.0,)] * 4)
    statistics = ActivationStatistics(
        EDGES, {layer.name: data}, {layer.name: out}, {layer.name: tensor(*[(1.0,), (2.0,), (4.0,), (8.0,)])}
    )
    return plan_scales(network(layer), Topology((layer,)), statistics, recipe_of(**{"ranges": "minmax", **options}))


FLAT = [(4.0,)] * 4
MOVING = [(1.0,), (2.0,), (4.0,), (8.0,)]
BRANCHES = [(1.0, 8.0)] * 4


# -------------------------------------------------------------------------------------------------------------- factors


def test_static_plan_by_hand() -> None:
    (layer,) = planned(conv(), tensor(*FLAT), zero_offset=False, step_bins=1).layers
    assert (layer.precision, layer.zero_offset, layer.inverse_k, layer.inverse_r) == ("int8", 0, None, None)
    assert layer.scale == pytest.approx(4 / 127, rel=1e-3)
    assert layer.output_scale == pytest.approx([3 / 127] * 16, rel=1e-3)
    assert layer.output_zero_point.tolist() == [128] * 16
    assert layer.notes == {
        "s": "minmax range over 4 timestep ranges", "z": "switched off: symmetric grid",
        "r": "switched off: one step bin",
    }  # fmt: skip


def test_an_offset_is_used_only_where_it_is_allowed() -> None:
    data = tensor(*FLAT, one_sided=True)
    with_z, without = (planned(conv(), data, zero_offset=allowed).layers[0] for allowed in (True, False))
    assert (with_z.zero_offset, without.zero_offset) == (128, 0)
    assert with_z.zero_point_u8 == 0
    assert with_z.scale == pytest.approx(4 / 255, rel=1e-3)
    assert without.scale == pytest.approx(4 / 127, rel=1e-3)


def test_branch_factors_stretch_the_narrow_branch_and_fold_exactly() -> None:
    layer = conv(branches=(4, 12))
    data = tensor(*BRANCHES, widths=(4, 12))
    plan = planned(layer, data, zero_offset=False).layers[0]
    assert plan.inverse_k is not None
    assert plan.inverse_k.tolist() == [pytest.approx(8, rel=0.01)] * 4 + [1.0] * 12
    np.testing.assert_array_equal(plan.inverse_k, plan.inverse_k.astype(np.float16))
    assert plan.scale == pytest.approx(8 / 127, rel=1e-3)
    # The codes are of W * k, so (x / k) (k W) = x W: check what the integers stand for against the float weight.
    weight = network(layer).unet.conv.weight.detach().numpy()
    effective = plan.codes * plan.weight_scales.reshape(-1, 1, 1, 1) * plan.inverse_k.reshape(1, -1, 1, 1)
    tolerance = plan.weight_scales.reshape(-1, 1, 1, 1) / 2 * plan.inverse_k.reshape(1, -1, 1, 1) * 1.001
    assert (np.abs(effective - weight) <= tolerance).all()
    assert plan.weight_sqnr_db is not None
    assert plan.weight_sqnr_db > 35
    assert plan.notes["k"].startswith("branch factors 0.125, 1 from ranges that differ 8.0")


def test_branch_factors_can_be_switched_off_or_left_out() -> None:
    layer = conv(branches=(4, 12))
    off = planned(layer, tensor(*BRANCHES, widths=(4, 12)), concat_scales="none").layers[0]
    assert off.inverse_k is None
    assert off.notes["k"] == "switched off: the skip branches share one scale"
    similar = tensor(*[(4.0, 4.8)] * 4, widths=(4, 12))
    left_out = planned(layer, similar, branch_ratio=1.25).layers[0]
    assert left_out.inverse_k is None
    assert left_out.notes["k"] == "left out: the branches' ranges differ by 1.20, less than 1.25"
    assert planned(layer, similar, branch_ratio=1.1).layers[0].inverse_k is not None
    assert "k" not in planned(conv(), tensor(*FLAT)).layers[0].notes  # no concatenation, nothing to say


def test_step_gains_follow_the_range_and_are_at_least_one() -> None:
    plan = planned(conv(), tensor(*MOVING), zero_offset=False)
    layer = plan.layers[0]
    assert plan.timestep_edges.tolist() == EDGES.tolist()
    assert layer.inverse_r is not None
    np.testing.assert_allclose(1 / layer.inverse_r, [1, 2, 4, 8], rtol=2e-3)
    assert (layer.inverse_r <= 1).all()
    assert layer.inverse_r.max() == 1.0
    np.testing.assert_array_equal(layer.inverse_r, layer.inverse_r.astype(np.float16))
    assert layer.scale == pytest.approx(1 / 127, rel=5e-3)  # the smallest bin's range
    # Under gains the output grid is that of the product before gain and bias: 1 / 1, 2 / 2, 4 / 4, 8 / 8.
    assert layer.output_scale == pytest.approx([1 / 127] * 16, rel=5e-3)


def test_weights_of_4_bits_use_15_codes_and_are_remembered(tiny: Any, tmp_path: Path) -> None:
    plan = tiny.plan("variance", bits=4, ranges="mse")
    assert {layer.weight_bits for layer in plan.quantized} == {4}
    assert max(int(np.abs(layer.codes).max()) for layer in plan.quantized) == 7
    assert all(layer.weight_sqnr_db is not None and 12 < layer.weight_sqnr_db < 30 for layer in plan.quantized)
    plan.save(tmp_path)
    assert QuantizationPlan.load(tmp_path).quantized[0].weight_bits == 4


def test_two_step_bins_merge_the_timestep_bins() -> None:
    plan = planned(conv(), tensor(*MOVING), zero_offset=False, step_bins=2)
    assert plan.timestep_edges.tolist() == [0, 500, 1000]
    assert plan.layers[0].inverse_r is not None
    np.testing.assert_allclose(1 / plan.layers[0].inverse_r, [1, 4], rtol=2e-3)  # 2 and 8
    assert plan.bin_of_timestep().tolist() == [0] * 500 + [1] * 500


def test_gains_stay_off_where_they_are_not_wanted() -> None:
    assert planned(conv(), tensor(*MOVING), step_bins=1).layers[0].inverse_r is None
    normalized = planned(conv(normalized=True), tensor(*MOVING)).layers[0]
    assert normalized.inverse_r is None
    assert normalized.notes["r"].startswith("static: a normalization stands before this input")
    slow = tensor((4.0,), (4.0,), (4.4,), (4.4,))
    static = planned(conv(), slow, gain_ratio=1.15, zero_offset=False).layers[0]
    assert static.inverse_r is None
    assert static.notes["r"] == "static: the range moves 1.10-fold over the timestep bins, less than 1.15"
    assert planned(conv(), slow, gain_ratio=1.05).layers[0].inverse_r is not None


def test_k_and_r_combine() -> None:
    data = tensor((1.0, 8.0), (2.0, 16.0), (4.0, 32.0), (8.0, 64.0), widths=(4, 12))
    layer = planned(conv(branches=(4, 12)), data, zero_offset=False).layers[0]
    assert layer.inverse_k is not None
    assert layer.inverse_r is not None
    np.testing.assert_allclose(layer.inverse_k, [8.0] * 4 + [1.0] * 12, rtol=0.01)
    np.testing.assert_allclose(1 / layer.inverse_r, [1, 2, 4, 8], rtol=5e-3)
    assert layer.scale == pytest.approx(8 / 127, rel=0.01)  # every branch and bin fills [-8, 8]
    # The wide branch is positive and the narrow one negative: only with its factor does the latter reach -8.
    one_sided = tensor((1.0, 8.0), (2.0, 16.0), (4.0, 32.0), (8.0, 64.0), widths=(4, 12), one_sided=True)
    one_sided.counts[:, 0] = one_sided.counts[:, 0, ::-1].copy()
    layer = planned(conv(branches=(4, 12)), one_sided).layers[0]
    assert layer.inverse_k is not None
    assert layer.inverse_r is not None
    assert layer.scale == pytest.approx(16 / 255, rel=0.01)
    assert layer.zero_offset == pytest.approx(0, abs=2)


def test_step_bins_are_cut_where_the_range_changes_and_the_plan_says_so() -> None:
    data = tensor((1.0,), (8.0,), (8.0,), (8.0,))
    for bins in (2, "auto"):
        plan = planned(conv(), data, step_bins=bins)
        assert plan.timestep_edges.tolist() == [0, 250, 1000]
        assert plan.provenance["step_bins"]["layers_with_gains"] == plan.summary()["step_gains"] == 1
        assert plan.provenance["step_bins"]["reason"] in plan.layers[0].notes["r"]
        noise = plan.provenance["step_bins"]["relative_noise"]
        assert noise["2"] < 0.5 * noise["1"]
    assert "as asked for" in planned(conv(), data, step_bins=2).layers[0].notes["r"]
    assert plan.options["activations"]["step_bins"] == "auto"


def test_weights_of_the_timesteps_move_the_cut() -> None:
    data = tensor((1.0,), (1.0,), (4.0,), (16.0,))
    statistics = ActivationStatistics(EDGES, {"conv": data}, {"conv": data}, {"conv": data})
    for weights, edge in ([50.0, 50.0, 1.0, 1.0], 500), ([0.01, 0.01, 1.0, 1.0], 750):
        plan = plan_scales(
            network(conv()), Topology((conv(),)), statistics, recipe_of(step_bins=2),
            importance=lambda weights=weights: np.array(weights),
        )  # fmt: skip
        assert plan.timestep_edges.tolist() == [0, edge, 1000]


def test_automatic_bins_are_one_where_nothing_moves() -> None:
    plan = planned(conv(), tensor(*FLAT), step_bins="auto")
    assert plan.timestep_edges.tolist() == [0, 1000]
    assert plan.layers[0].notes["r"] == "static: one bin, chosen automatically: no input's scale moves 1.3-fold"


def test_more_bins_than_were_calibrated_are_refused() -> None:
    with pytest.raises(
        InputError, match="5 step bins were asked for, but the calibration set only tells 4 timestep ranges apart"
    ):
        planned(conv(), tensor(*FLAT), step_bins=5)


# ------------------------------------------------------------------------------------------------------- whole networks


def test_layers_that_read_one_tensor_share_its_grid(tiny: Any) -> None:
    plan = tiny.plan("labels")
    shared = [layers for layers in tiny.topology("labels").groups().values() if len(layers) > 1]
    assert len(shared) >= 2
    for layers in shared:
        first, *others = (plan.layer(layer.name) for layer in layers)
        for other in others:
            assert (other.scale, other.zero_offset) == (first.scale, first.zero_offset)
            assert (other.codes.shape, other.weight_scales.tobytes()) != (
                first.codes.shape,
                first.weight_scales.tobytes(),
            )


def test_every_layer_is_planned_in_order_and_floats_say_why(tiny: Any) -> None:
    for name in ("labels", "rgb", "text", "variance"):
        plan, topology = tiny.plan(name), tiny.topology(name)
        assert plan.topology == topology
        assert {p.name: p.reason for p in plan.layers if p.precision == "float"} == {
            item.name: item.float_reason for item in topology if item.float_reason
        }
        assert all(p.weight_codes is None for p in plan.layers if p.precision == "float")
        assert plan.summary()["int8"] == len(topology.candidates) == len(plan.quantized)
        for layer in plan.quantized:
            assert layer.codes.shape == layer.layer.weight_shape
            assert (np.abs(layer.codes.astype(int)).max() == 127) == (not layer.layer.upsampled)
            assert (layer.output_scale is None) == (layer.layer.kind == "linear")


def test_the_tiny_plan_uses_every_factor(tiny: Any) -> None:
    summary = tiny.plan("labels").summary()
    assert min(summary[key] for key in ("zero_offset", "branch_factors", "step_gains")) >= 3
    both = [p.name for p in tiny.plan("labels").quantized if p.inverse_k is not None and p.inverse_r is not None]
    assert both
    off = tiny.plan("labels", zero_offset=False, concat_scales="none", step_bins=1).summary()
    assert (off["zero_offset"], off["branch_factors"], off["step_gains"]) == (0, 0, 0)


# ------------------------------------------------------------------------------------------------------- the saved plan


def same(left: QuantizationPlan, right: QuantizationPlan) -> None:
    np.testing.assert_array_equal(left.timestep_edges, right.timestep_edges)
    assert (dict(left.options), dict(left.provenance)) == (dict(right.options), dict(right.provenance))
    assert len(left.layers) == len(right.layers)
    for mine, theirs in zip(left.layers, right.layers, strict=True):
        for field, value in vars(mine).items():
            other = getattr(theirs, field)
            if isinstance(value, np.ndarray):
                np.testing.assert_array_equal(value, other)
                assert value.dtype == other.dtype
            else:
                assert value == other, (mine.name, field)


def test_save_and_load_keep_everything(tiny: Any, tmp_path: Path) -> None:
    plan = tiny.plan("labels")
    plan.save(tmp_path)
    same(plan, QuantizationPlan.load(tmp_path))
    readable = json.loads((tmp_path / "plan.json").read_text())
    assert readable["options"]["activations"]["gain_ratio"] == 1.02
    assert [entry["layer"]["name"] for entry in readable["layers"]] == [p.name for p in plan.layers]


def test_an_edited_plan_json_is_refused(tiny: Any, tmp_path: Path) -> None:
    tiny.plan("variance").save(tmp_path)
    path = tmp_path / "plan.json"
    document = json.loads(path.read_text())
    document["layers"][1]["scale"] = 0.5
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"plan\.json and plan\.safetensors beside it are not of the same plan"):
        QuantizationPlan.load(tmp_path)


def test_two_halves_of_different_plans_are_refused(tiny: Any, tmp_path: Path) -> None:
    for name in ("variance", "rgb"):
        (tmp_path / name).mkdir()
        tiny.plan(name).save(tmp_path / name)
    (tmp_path / "rgb" / "plan.json").replace(tmp_path / "variance" / "plan.json")
    with pytest.raises(InputError, match="not of the same plan"):
        QuantizationPlan.load(tmp_path / "variance")


@pytest.mark.parametrize("damage", ["missing", "text", "binary"])
def test_an_unreadable_plan_json_is_refused(tiny: Any, tmp_path: Path, damage: str) -> None:
    tiny.plan("variance").save(tmp_path)
    path = tmp_path / "plan.json"
    if damage == "missing":
        path.unlink()
    elif damage == "text":
        path.write_text("{")
    else:
        path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"plan\.json cannot be read"):
        QuantizationPlan.load(tmp_path)


def test_a_truncated_plan_is_refused(tiny: Any, tmp_path: Path) -> None:
    tiny.plan("variance").save(tmp_path)
    path = tmp_path / "plan.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"plan\.safetensors"):
        QuantizationPlan.load(tmp_path)


def test_a_float_layer_has_no_codes(tiny: Any) -> None:
    layer = tiny.plan("variance").layer("conv_in")
    with pytest.raises(ValueError, match="conv_in is planned in float; it has no weight codes"):
        _ = layer.codes
    with pytest.raises(ValueError, match="conv_in is planned in float; it has no weight scales"):
        _ = layer.weight_scales
    with pytest.raises(KeyError, match="nowhere"):
        tiny.plan("variance").layer("nowhere")


def test_the_u8_zero_point_is_that_of_the_same_grid() -> None:
    for offset in (-127, 0, 78, 128):
        point = LayerPlan(conv(), "int8", scale=1.0, zero_offset=offset).zero_point_u8
        assert 0 <= point <= 255
        s8 = np.arange(-128, 128)
        np.testing.assert_array_equal(s8 + offset, (s8 + 128) - point)  # u8 = s8 + 128 stands for the same step
