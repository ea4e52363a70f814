"""Learned activation scales: they repair a bad range, never hurt a good one, and touch nothing else."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qdm_calibration.ranges import float16_exact
from qdm_calibration.reconstruct import ReconstructOptions
from qdm_calibration.simulate import simulate
from qdm_calibration.step_size import learn_step_sizes
from qdm_deploy.artifacts.plan import QuantizationPlan


def sqnr_db(tiny: Any, plan: QuantizationPlan) -> float:
    network, calibration = tiny.checkpoint("variance").unet, tiny.calibration("variance")
    inputs = (torch.from_numpy(calibration.sample), torch.from_numpy(calibration.timestep))
    conditioning = {name: torch.from_numpy(value) for name, value in calibration.conditioning.items()}
    with torch.inference_mode():
        reference = network(*inputs, **conditioning)
        output = simulate(network, plan, "tensorrt")(*inputs, **conditioning)
    return float(10 * torch.log10(reference.square().sum() / (reference - output).square().sum()))


def test_scales_that_are_too_wide_shrink_and_the_output_comes_closer(tiny: Any, tmp_path: Path) -> None:
    good = tiny.plan("variance", zero_offset=False)
    wide = replace(good, layers=tuple(replace(layer, scale=float16_exact(layer.scale * 8)) for layer in good.layers))
    options = ReconstructOptions(iterations=120, rows=20, batch_size=8, folder=tmp_path)
    arguments = (tiny.checkpoint("variance").unet, wide, tiny.calibration("variance"), options)
    learned = learn_step_sizes(*arguments)
    changed = [
        (before, after)
        for before, after in zip(wide.quantized, learned.quantized, strict=True)
        if before.scale != after.scale
    ]
    assert len(changed) > len(wide.quantized) / 2
    for before, after in changed:
        assert after.scale == float(np.float16(after.scale))
        assert "held-out error fell" in after.notes["s"]
        assert after.zero_offset == before.zero_offset
        np.testing.assert_array_equal(after.codes, before.codes)
    assert np.mean([after.scale < before.scale for before, after in changed]) > 0.8
    assert sqnr_db(tiny, learned) > sqnr_db(tiny, wide)
    again = learn_step_sizes(*arguments)
    assert [layer.scale for layer in again.layers] == [layer.scale for layer in learned.layers]


def test_layers_of_a_group_keep_one_scale(tiny: Any) -> None:
    options = ReconstructOptions(iterations=10, rows=10, batch_size=4)
    plan = tiny.plan("labels")
    learned = learn_step_sizes(tiny.checkpoint("labels").unet, plan, tiny.calibration("labels"), options)
    scales: dict[str, set[float]] = {}
    for layer in learned.quantized:
        scales.setdefault(layer.layer.input_group, set()).add(layer.scale)
    assert {len(values) for values in scales.values()} == {1}
    assert any(len(members) > 1 for members in plan.topology.groups().values())
