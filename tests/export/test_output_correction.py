"""The corrected output: each row by the entry of its own timestep, in every target, in float32."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from qdm_calibration.simulate import simulate
from qdm_deploy.artifacts.plan import TARGETS, QuantizationPlan
from qdm_deploy.errors import ExportError
from qdm_export.passes.output_correction import OutputCorrection
from qdm_export.targets import emit


def with_table(tiny: Any, name: str) -> QuantizationPlan:
    """A plan with random tables; as a correction has them, they hold nothing for a learned variance."""
    plan = tiny.plan(name)
    outputs, channels = tiny.checkpoint(name).unet.unet.conv_out.out_channels, tiny.calibration(name).sample.shape[1]
    table = np.random.default_rng(3).normal(scale=1e-3, size=(plan.timestep_edges[-1], 3, outputs))
    table[:, :, channels:] = 0
    return replace(plan, output_correction=table.astype(np.float32))


def corrected_by(table: Any, output: Any, sample: Any) -> Any:
    shift, gain, share = table.astype(np.float64)[..., None, None].swapaxes(0, 1)
    return (output.astype(np.float64) - shift - share * sample) / (1 + gain)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["labels", "variance"])
def test_each_row_is_corrected_by_its_own_timestep(
    emitted: Any, tiny: Any, run_graph: Any, name: str, target: Any
) -> None:
    plan = with_table(tiny, name)
    feeds = emitted.feeds(name, 3, seed=11)
    feeds["timestep"] = np.array([0, 412, plan.timestep_edges[-1] - 1])
    feeds["coefficients"][:, :3] = 0, 1, 1e3  # x0 = 0 * sample + 1 * output, not clipped
    before = run_graph(emitted.graph(name, target), feeds, optimize=False)["x0"]
    after = run_graph(emit(tiny.float_graph(name), plan, target).model, feeds, optimize=False)["x0"]
    table = plan.output_correction[feeds["timestep"]][:, :, : before.shape[1]]
    expected = corrected_by(table, before, feeds["sample"])
    assert np.abs(expected - before).max() > 1e-3
    # In half precision an entry of 1e-3 would drown beside an output of 1: the difference is one of float32.
    np.testing.assert_allclose(after, expected, atol=2e-6)


@pytest.mark.parametrize("name", ["labels", "variance"])
def test_the_simulation_corrects_alike(tiny: Any, name: str) -> None:
    plan, network = with_table(tiny, name), tiny.checkpoint(name).unet
    rows = tiny.calibration(name)
    sample, timestep = torch.from_numpy(rows.sample[:3]), torch.tensor([3, 500, 999])
    conditioning = {key: torch.from_numpy(value[:3]) for key, value in rows.conditioning.items()}
    with torch.inference_mode():
        plain = simulate(network, tiny.plan(name), "tensorrt")(sample, timestep, **conditioning).numpy()
        found = simulate(network, plan, "tensorrt")(sample, timestep, **conditioning).numpy()
    known = np.concatenate([sample.numpy()] * (plain.shape[1] // sample.shape[1]), axis=1)
    expected = corrected_by(plan.output_correction[timestep.numpy()], plain, known)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    variance = slice(sample.shape[1], None)
    np.testing.assert_array_equal(found[:, variance], plain[:, variance])


def test_a_plan_without_a_table_leaves_the_graph_alone(tiny: Any, emitted: Any) -> None:
    assert not OutputCorrection(tiny.plan("labels"))(emitted.graph("labels", "openvino").clone()).modified


def test_a_graph_without_timesteps_cannot_be_corrected(tiny: Any) -> None:
    graph = tiny.float_graph("labels").clone()
    next(value for value in graph.graph.inputs if value.name == "timestep").name = "t"
    with pytest.raises(ExportError, match="no timestep input"):
        OutputCorrection(with_table(tiny, "labels"))(graph)
