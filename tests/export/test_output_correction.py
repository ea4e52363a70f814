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
    plan = tiny.plan(name)
    shape = (plan.timestep_edges[-1], tiny.checkpoint(name).unet.unet.conv_out.out_channels)
    table = np.random.default_rng(3).normal(scale=1e-3, size=shape).astype(np.float32)
    return replace(plan, output_correction=table)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["labels", "variance"])
def test_the_table_is_subtracted_row_by_row(emitted: Any, tiny: Any, run_graph: Any, name: str, target: Any) -> None:
    plan = with_table(tiny, name)
    feeds = emitted.feeds(name, 3, seed=11)
    feeds["timestep"] = np.array([0, 412, plan.timestep_edges[-1] - 1])
    feeds["coefficients"][:, :3] = 0, 1, 1e3  # x0 = 0 * sample + 1 * output, not clipped
    before = run_graph(emitted.graph(name, target), feeds, optimize=False)["x0"]
    after = run_graph(emit(tiny.float_graph(name), plan, target), feeds, optimize=False)["x0"]
    expected = plan.output_correction[feeds["timestep"]][:, : before.shape[1], None, None]
    # In half precision an entry of 1e-3 would drown beside an output of 1: the difference is one of float32.
    np.testing.assert_allclose(before - after, np.broadcast_to(expected, before.shape), atol=1e-6)


def test_the_simulation_subtracts_the_same(tiny: Any) -> None:
    plan, network = with_table(tiny, "labels"), tiny.checkpoint("labels").unet
    rows = tiny.calibration("labels")
    sample, timestep = torch.from_numpy(rows.sample[:3]), torch.tensor([3, 500, 999])
    conditioning = {name: torch.from_numpy(value[:3]) for name, value in rows.conditioning.items()}
    with torch.inference_mode():
        plain = simulate(network, tiny.plan("labels"), "tensorrt")(sample, timestep, **conditioning)
        corrected = simulate(network, plan, "tensorrt")(sample, timestep, **conditioning)
    table = torch.from_numpy(plan.output_correction)
    torch.testing.assert_close(plain - corrected, table[timestep][:, :, None, None].expand_as(plain), atol=1e-6, rtol=0)


def test_a_plan_without_a_table_leaves_the_graph_alone(tiny: Any, emitted: Any) -> None:
    assert not OutputCorrection(tiny.plan("labels"))(emitted.graph("labels", "openvino").clone()).modified


def test_a_graph_without_timesteps_cannot_be_corrected(tiny: Any) -> None:
    graph = tiny.float_graph("labels").clone()
    next(value for value in graph.graph.inputs if value.name == "timestep").name = "t"
    with pytest.raises(ExportError, match="no timestep input"):
        OutputCorrection(with_table(tiny, "labels"))(graph)
