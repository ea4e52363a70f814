"""What single layers take: every layer of the plan has a time, and large models are left alone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qdm_deploy.artifacts.phase_sums import fits_phases
from qdm_deploy.backends.openvino.profile import StepProfile, step_profiles, turn_means
from qdm_deploy.building import layer_times
from qdm_deploy.building.layer_times import LayerTimer
from qdm_deploy.building.options import BuildOptions
from qdm_deploy.progress import SILENT
from qdm_deploy.runtime.cpu import saturates_int8

pytest.importorskip("openvino")
OPTIONS = BuildOptions(out=Path("x.qdm"))
with_int8 = pytest.mark.skipif(
    saturates_int8(),
    reason="this CPU's INT8 products saturate; would have shown what OpenVINO's INT8 layers take",
)


def times_of(tiny: Any, name: str, options: BuildOptions = OPTIONS) -> Any:
    spec = tiny.checkpoint(name).denoiser
    return LayerTimer(options, tiny.float_graph(name), spec, SILENT).layer_times(tiny.plan(name))


@with_int8
@pytest.mark.parametrize("name", ["labels", "text"])
def test_every_layer_has_a_time_and_all_together_are_a_part_of_the_step(tiny: Any, name: str) -> None:
    found = times_of(tiny, name)
    assert found is not None
    assert set(found.extra_ms) == {layer.name for layer in tiny.plan(name).quantized}
    assert found.step_ms > 0
    assert any(value != 0 for value in found.extra_ms.values())


@with_int8
def test_times_follow_the_node(monkeypatch: pytest.MonkeyPatch, tiny: Any) -> None:
    """Each layer takes 3 ms in the graph that has nothing in INT8, under the names of that graph, and 1 ms in INT8."""
    seen: list[set[str]] = []

    def told(graphs: list[Path], inputs: Any, **options: Any) -> list[StepProfile]:
        int8, in_float = step_profiles(graphs, inputs)
        seen.extend([set(int8.products), set(in_float.products)])
        return [
            StepProfile(dict.fromkeys(int8.products, 1.0), int8.step_ms),
            StepProfile(dict.fromkeys(in_float.products, 3.0), in_float.step_ms),
        ]

    monkeypatch.setattr(layer_times, "step_profiles", told)
    found = times_of(tiny, "labels")
    # One behind an upsampling is four kernels in INT8, 1 ms each.
    phased = {layer.name for layer in tiny.plan("labels").quantized if fits_phases(layer)}
    assert phased
    assert found.extra_ms == {name: -1.0 if name in phased else 2.0 for name in found.extra_ms}
    assert set(found.extra_ms) <= seen[0]
    assert not set(found.extra_ms) <= seen[1]


def test_there_are_none_without_the_backend_or_for_large_models(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert times_of(tiny, "labels", replace(OPTIONS, targets=("onnxruntime",))) is None
    monkeypatch.setattr(layer_times, "_MOST_WEIGHTS", 100)
    assert times_of(tiny, "labels") is None


def test_there_are_none_where_int8_products_saturate(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_times, "saturates_int8", lambda: True)
    assert not layer_times.can_be_timed(OPTIONS)
    assert times_of(tiny, "labels") is None
    monkeypatch.setattr(layer_times, "saturates_int8", lambda: False)
    assert layer_times.can_be_timed(OPTIONS)


def test_what_the_first_steps_took_does_not_count() -> None:
    # 90, then 10 and 20 milliseconds a step, in turns of two; OpenVINO tells the average since the beginning.
    assert turn_means([(2, 90.0), (4, 50.0), (6, 40.0)]) == pytest.approx([10.0, 20.0])


@with_int8
def test_a_step_takes_at_least_what_its_products_take(monkeypatch: pytest.MonkeyPatch, tiny: Any) -> None:
    def told(graphs: list[Path], inputs: Any, **options: Any) -> list[StepProfile]:
        int8, in_float = step_profiles(graphs, inputs)
        return [
            StepProfile(dict.fromkeys(int8.products, 1.0), 0.5),
            StepProfile(dict.fromkeys(in_float.products, 0.0), 0.5),
        ]

    monkeypatch.setattr(layer_times, "step_profiles", told)
    found = times_of(tiny, "labels")
    assert found.step_ms + sum(found.extra_ms.values()) == 0
    assert found.step_ms == len(found.extra_ms) + 3 * sum(map(fits_phases, tiny.plan("labels").quantized))
