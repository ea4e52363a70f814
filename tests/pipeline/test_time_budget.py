"""``--keep-fp N%time`` is kept to by the clock; only the clock is told what to say here."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qdm_deploy.artifacts.plan import QuantizationPlan
from qdm_deploy.building.layer_times import LayerTimer, LayerTimes
from qdm_deploy.building.options import BuildOptions
from qdm_deploy.building.sensitivity import Budgeted, measured_and_kept
from qdm_deploy.progress import SILENT

OPTIONS = BuildOptions(out=Path("x.qdm"), keep_fp="20%time")


@dataclass(frozen=True)
class ToldTimer(LayerTimer):
    """Every layer adds 1 ms in float to a step of 20; what a plan really takes comes from ``part``."""

    part: Callable[[int], float] = float

    def layer_times(self, plan: QuantizationPlan) -> LayerTimes:
        return LayerTimes(20.0, {layer.name: 1.0 for layer in plan.quantized}, "a told clock")

    def longer(self, plan: QuantizationPlan, kept: QuantizationPlan) -> float:
        return self.part(len(plan.quantized) - len(kept.quantized))


def budgeted(tiny: Any, part: Callable[[int], float]) -> tuple[Budgeted, int]:
    plan, checkpoint = tiny.plan("rgb"), tiny.checkpoint("rgb")
    timer = ToldTimer(OPTIONS, tiny.float_graph("rgb"), checkpoint.denoiser, SILENT, part)
    found = measured_and_kept(OPTIONS, checkpoint, tiny.calibration("rgb"), plan, SILENT, timer)
    return found, len(plan.quantized) - len(found.plan.quantized)


@pytest.mark.parametrize(("part", "kept"), [(0.05, 4), (0.052, 4), (0.15, 1), (0.07, 2)])
def test_fewer_layers_are_kept_where_they_take_longer_than_their_products(tiny: Any, part: float, kept: int) -> None:
    found, count = budgeted(tiny, lambda layers: part * layers)
    assert count == kept
    assert not found.warnings


def test_where_nothing_helps_no_layer_is_kept_and_that_is_told(tiny: Any) -> None:
    found, count = budgeted(tiny, lambda layers: 0.3)
    assert count == 0
    (warning,) = found.warnings
    assert warning.startswith(
        "--keep-fp 20%time keeps no layer (a told clock): with 1 layer in float a step takes +30.0%"
    )
