"""What a report shows of ranges and noise is what the statistics and the measurement say."""

import re
from typing import Any

import numpy as np
import pytest
import torch

from qdm_calibration.sensitivity import measure_sensitivity
from qdm_deploy.artifacts.plan import QuantizationPlan
from qdm_deploy.building.float_layers import Budgeted, choose_float_layers
from qdm_deploy.pipeline import BuildResult, inspect
from qdm_deploy.report.ranges import LEVELS, InputRanges, input_ranges
from tests.recipes import recipe_of


@pytest.fixture(scope="module")
def ranges(tiny: Any) -> dict[str, InputRanges]:
    found = input_ranges(tiny.statistics("labels"), tiny.plan("labels"))
    return {item.layers[0]: item for item in found}


def raw_inputs(tiny: Any, layer: str) -> Any:
    """What a layer gets from the whole calibration set, [rows, C, H, W], float64."""
    data, network = tiny.calibration("labels"), tiny.checkpoint("labels").unet
    seen = []
    module = network.unet.get_submodule(layer)
    handle = module.register_forward_pre_hook(lambda module, args: seen.append(args[0].double().numpy()))
    conditioning = {name: torch.from_numpy(values) for name, values in data.conditioning.items()}
    with torch.inference_mode():
        network(torch.from_numpy(data.sample), torch.from_numpy(data.timestep), **conditioning)
    handle.remove()
    return seen[0]


def test_every_shared_input_is_there_once(tiny: Any, ranges: dict[str, InputRanges]) -> None:
    groups = tiny.plan("labels").topology.groups()
    assert {name: item.layers for name, item in ranges.items()} == {
        name: tuple(layer.name for layer in layers) for name, layers in groups.items()
    }


@pytest.mark.parametrize("layer", ["down_blocks.0.resnets.0.conv2", "up_blocks.0.resnets.0.conv_shortcut"])
def test_boxes_are_quantiles_of_the_raw_values_at_their_timesteps(
    tiny: Any, ranges: dict[str, InputRanges], layer: str
) -> None:
    raw, timesteps = raw_inputs(tiny, layer), tiny.calibration("labels").timestep
    boxes = ranges[layer].boxes
    assert 1 < len(boxes) <= 10
    assert [box.first for box in boxes] == [0, *(box.last + 1 for box in boxes[:-1])]
    assert boxes[-1].last == 999
    for box in boxes:
        values = raw[(timesteps >= box.first) & (timesteps <= box.last)]
        expected = np.quantile(values, (0, *LEVELS, 1), method="inverted_cdf")
        peak = np.abs(expected).max()
        assert box.quantiles[0] == pytest.approx(expected[0], rel=1e-4)
        assert box.quantiles[-1] == pytest.approx(expected[-1], rel=1e-4)
        # Two widths of a bin over the next power of two.
        np.testing.assert_allclose(box.quantiles, expected, atol=2 * 4 * peak / 4096, rtol=1e-4)


def test_branches_are_those_of_the_concatenation(tiny: Any, ranges: dict[str, InputRanges]) -> None:
    layer = next(
        item for item in tiny.plan("labels").quantized if item.layer.reads_concat and item.inverse_k is not None
    )
    branches = ranges[layer.layer.input_group].branches
    assert tuple(branch.channels for branch in branches) == layer.layer.branches
    raw, start = raw_inputs(tiny, layer.name), 0
    for branch in branches:
        values = raw[:, start : start + branch.channels]
        assert (branch.box.quantiles[0], branch.box.quantiles[-1]) == pytest.approx(
            (values.min(), values.max()), rel=1e-4
        )
        assert branch.box.quantiles[3] == pytest.approx(np.median(values), abs=4 * np.abs(raw).max() / 4096)
        assert branch.factor[0] == branch.factor[1] == pytest.approx(1 / layer.inverse_k[start], rel=1e-4)
        start += branch.channels
    assert len({branch.factor for branch in branches}) == 2
    assert ranges[layer.layer.input_group].grid == ()


def test_the_grid_is_what_the_lowest_and_highest_code_mean(tiny: Any, ranges: dict[str, InputRanges]) -> None:
    plan = tiny.plan("labels")
    layer = next(item for item in plan.quantized if item.inverse_r is not None and item.inverse_k is None)
    grid = ranges[layer.layer.input_group].grid
    assert [span.first for span in grid] == plan.timestep_edges[:-1].tolist()
    for span, inverse in zip(grid, layer.inverse_r, strict=True):
        codes = np.array([-128, 127]) + layer.zero_offset
        assert (span.low, span.high) == pytest.approx(tuple(layer.scale / inverse * codes), rel=1e-4)
    static = next(item for item in plan.quantized if item.inverse_r is None and item.inverse_k is None)
    (only,) = ranges[static.layer.input_group].grid
    assert (only.first, only.last) == (0, 999)


def test_movement_is_the_ratio_of_the_largest_to_the_smallest_range(ranges: dict[str, InputRanges]) -> None:
    for item in ranges.values():
        sizes = [max(-box.quantiles[1], box.quantiles[5]) for box in item.boxes]
        assert item.movement == pytest.approx(max(sizes) / min(sizes))


def budgeted(tiny: Any, min_sqnr_db: float = 25.0, **changes: Any) -> Budgeted:
    network, plan = tiny.checkpoint("rgb").unet, tiny.plan("rgb")
    return choose_float_layers(recipe_of(**changes), network, plan, tiny.calibration("rgb"), min_sqnr_db=min_sqnr_db)


def test_the_noise_block_is_the_measurement(tiny: Any) -> None:
    found = budgeted(tiny, keep_fp="none")
    network, plan, data = tiny.checkpoint("rgb").unet, tiny.plan("rgb"), tiny.calibration("rgb")
    expected = measure_sensitivity(network, plan, data, rows=8).balanced()
    assert found.plan == plan
    assert found.shares == pytest.approx(expected.shares())
    noise = found.noise
    assert noise is not None
    assert (noise.rows, noise.kept, noise.int8_share) == (8, 0, 1.0)
    assert noise.sqnr_db == pytest.approx(expected.sqnr_db())
    assert noise.frontier[0].sqnr_db == noise.sqnr_db
    assert noise.frontier[1].layer == expected.ranked()[0]
    assert noise.frontier[1].noise_share == pytest.approx(1 - max(expected.shares().values()))
    assert found.warnings == ()


def test_auto_says_when_its_target_is_out_of_reach(tiny: Any) -> None:
    found = budgeted(tiny, keep_fp="auto", min_sqnr_db=200.0)
    assert found.noise is not None
    (warning,) = found.warnings
    assert f"is {found.noise.sqnr_db:.1f} dB, and 200 dB was asked for. It keeps 10% at most" in warning
    assert f"with {found.noise.kept} layer" in warning
    assert found.noise.kept == len(tiny.plan("rgb").quantized) - len(found.plan.quantized)
    assert found.noise.int8_share >= 0.9
    assert budgeted(tiny, keep_fp="auto", min_sqnr_db=1.0).warnings == ()


def test_nothing_is_measured_where_nobody_wants_it(tiny: Any) -> None:
    name = tiny.plan("rgb").quantized[0].name
    found = budgeted(tiny, sensitivity=False, keep_fp=name)
    assert (found.noise, found.shares, found.warnings) == (None, {}, ())
    assert found.plan.layer(name).precision == "float"
    assert budgeted(tiny, sensitivity=False, keep_fp="10%").noise is not None


def test_a_build_reports_ranges_noise_and_seeds(labels_build: BuildResult) -> None:
    report = labels_build.report
    plan = QuantizationPlan.load(labels_build.bundle / "unet")
    assert [item.layers[0] for item in report.inputs] == list(plan.topology.groups())
    shares = {row.name: row.noise_share for row in report.layers if row.noise_share is not None}
    assert set(shares) == {item.name for item in plan.quantized}
    assert sum(shares.values()) == pytest.approx(1)
    assert report.noise is not None
    assert report.noise.frontier[1].layer == max(shares, key=lambda name: shares[name])
    assert inspect(labels_build.bundle).noise_shares == shares
    assert report.seeds == {"calibration": (0, 3), "verdict": (2**40, 2**40 + 1)}
    page = (labels_build.bundle / "report.html").read_text(encoding="utf-8")
    titles = re.findall(r"<h2>(.*?)</h2>", page)
    for title in (
        "Activation ranges over the timesteps", "Ranges at the skip concatenations", "Noise and the frontier"
    ):  # fmt: skip
        assert title in titles
    assert page.count('class="chart small"') == len(report.inputs) + sum(bool(item.branches) for item in report.inputs)
