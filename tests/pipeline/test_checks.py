"""The checks of a build fail where a graph does not compute what was planned."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qdm_calibration.channel_factors import ChannelFactors
from qdm_calibration.plan import PlanOptions, make_plan
from qdm_calibration.statistics import collect_scaled_inputs
from qdm_deploy.backends import OnnxRuntimeSession
from qdm_deploy.building.checks import (
    check_bfloat16_graph,
    check_float_graph,
    check_half_graph,
    check_integer_kernels,
    check_layers,
    run_graph,
)
from qdm_deploy.building.measure import simulation_of
from qdm_deploy.building.quality import network_output
from qdm_deploy.samplers.columns import NO_CLIP
from qdm_deploy.samplers.random_inputs import random_inputs
from qdm_deploy.samplers.sampling import Sampling
from qdm_export import absorb, targets
from qdm_export.float_graph import save_graph
from qdm_export.targets import emit, emit_float

LAYER = "down_blocks.0.resnets.0.conv2"


def altered(plan: Any, **changes: Any) -> Any:
    """The same plan with other numbers for one layer."""
    layers = tuple(dataclasses.replace(item, **changes) if item.name == LAYER else item for item in plan.layers)
    return dataclasses.replace(plan, layers=layers)


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "tensorrt"])
def test_a_graph_of_the_plan_passes_and_one_of_another_plan_does_not(
    tiny: Any, tmp_path: Path, target: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, plan, graph = tiny.checkpoint("labels"), tiny.plan("labels"), tiny.float_graph("labels")
    inputs = random_inputs(checkpoint.denoiser, 3)
    good = check_layers(checkpoint, plan, target, graph, inputs, tmp_path)
    assert good.ok, good
    other = altered(plan, weight_codes=np.roll(plan.layer(LAYER).codes, 1, axis=0))
    monkeypatch.setattr(targets, "emit", lambda graph, plan, target, **form: emit(graph, other, target, **form))
    bad = check_layers(checkpoint, plan, target, graph, inputs, tmp_path)
    assert not bad.ok
    assert bad.detail.startswith(f"{len(plan.quantized) - 1} of {len(plan.quantized)} layers match")
    assert bad.detail.endswith(f"least at {LAYER})")


def test_a_lost_integer_kernel_is_counted(tiny: Any, tmp_path: Path) -> None:
    plan, spec = tiny.plan("labels"), tiny.checkpoint("labels").denoiser
    save_graph(emit(tiny.float_graph("labels"), plan, "onnxruntime").model, tmp_path / "int8.onnx")
    save_graph(emit_float(tiny.float_graph("labels")).model, tmp_path / "float.onnx")
    rows = []
    for name in ("int8", "float"):
        run_graph("onnxruntime", tmp_path / f"{name}.onnx", random_inputs(spec, 2), optimized=tmp_path / "optimized")
        rows.append(check_integer_kernels(plan, tmp_path / "optimized"))
    assert [row.ok for row in rows] == [True, False]
    assert rows[1].detail.startswith("0 of ")


def test_a_float_graph_that_is_off_by_a_thousandth_fails(tiny: Any, tmp_path: Path) -> None:
    checkpoint = tiny.checkpoint("variance")
    save_graph(emit_float(tiny.float_graph("variance")).model, tmp_path / "float.onnx")
    inputs = random_inputs(checkpoint.denoiser, 2, seed=3)
    outputs = run_graph("onnxruntime", tmp_path / "float.onnx", inputs)
    assert check_float_graph(outputs, checkpoint, inputs).ok
    off = {**outputs, "x0": outputs["x0"] * np.float32(1.001)}
    row = check_float_graph(off, checkpoint, inputs)
    assert not row.ok
    assert "60 dB" in row.detail


def test_a_float16_graph_is_held_against_the_simulation(tiny: Any, tmp_path: Path) -> None:
    checkpoint, plan = tiny.checkpoint("labels"), tiny.plan("labels")
    inputs = random_inputs(checkpoint.denoiser, 8)
    save_graph(emit_float(tiny.float_graph("labels")).model, tmp_path / "float.onnx")
    expected = run_graph("onnxruntime", tmp_path / "float.onnx", inputs)["x0"]
    with simulation_of(checkpoint, plan, "tensorrt") as session:
        simulated = session.run(inputs).x0.copy()
    save_graph(emit(tiny.float_graph("labels"), plan, "tensorrt").model, tmp_path / "right.onnx")
    assert check_half_graph(tmp_path / "right.onnx", expected, simulated, inputs).ok
    other = altered(plan, weight_codes=np.roll(plan.layer(LAYER).codes, 1, axis=0))
    save_graph(emit(tiny.float_graph("labels"), other, "tensorrt").model, tmp_path / "wrong.onnx")
    row = check_half_graph(tmp_path / "wrong.onnx", expected, simulated, inputs)
    assert not row.ok
    assert "dB from the float model, its simulation" in row.detail


def test_a_bfloat16_graph_is_held_against_the_simulation_and_bfloat16(tiny: Any, tmp_path: Path) -> None:
    checkpoint, plan, graph = tiny.checkpoint("labels"), tiny.plan("labels"), tiny.float_graph("labels")
    inputs = random_inputs(checkpoint.denoiser, 8)
    inputs["coefficients"][:, :3] = 0.0, 1.0, NO_CLIP
    save_graph(emit_float(graph).model, tmp_path / "float.onnx")
    expected = run_graph("onnxruntime", tmp_path / "float.onnx", inputs)["x0"]
    with simulation_of(checkpoint, plan, "tensorrt") as session:
        simulated = session.run(inputs).x0.copy()
    rows = []
    other = altered(plan, weight_codes=np.roll(plan.layer(LAYER).codes, 1, axis=0))
    for name, emitted in (("right", plan), ("wrong", other)):
        path = tmp_path / f"{name}.onnx"
        save_graph(emit(graph, emitted, "tensorrt", rest="bf16").model, path, weights=f"{name}.data")
        rows.append(check_bfloat16_graph(path, tmp_path / "float.onnx", expected, simulated, inputs, tmp_path))
    assert [row.ok for row in rows] == [True, False], rows
    assert "dB and bfloat16 without INT8" in rows[0].detail


@pytest.mark.parametrize(("name", "guidance"), [("rgb", 1.0), ("labels", 1.0), ("labels", 2.5), ("variance", 1.0)])
def test_the_network_output_is_read_through_the_step_graph(
    tiny: Any, tmp_path: Path, name: str, guidance: float
) -> None:
    """Teacher-forced outputs are the U-Net's own, guided, its noise half alone where it predicts a variance."""
    import torch

    checkpoint, table = tiny.checkpoint(name), tiny.table(name)
    spec = checkpoint.spec
    save_graph(emit_float(tiny.float_graph(name)).model, tmp_path / "float.onnx")
    states = np.random.default_rng(0).normal(size=(table.steps, 2, *spec.sample_shape)).astype(np.float32)
    conditioning = tiny.conditioning(name).take(slice(1, 3))
    with OnnxRuntimeSession(tmp_path / "float.onnx", threads=1) as session:
        read = network_output(session, Sampling(table, [0, 1], conditioning, guidance=guidance), states, 16, "reading")

    def network(states: Any, timestep: float, conditions: Any) -> Any:
        given = {key: torch.from_numpy(np.broadcast_to(value, (2,)).copy()) for key, value in conditions.items()}
        with torch.inference_mode():
            output = checkpoint.unet(torch.from_numpy(states), torch.full((2,), int(timestep)), **given)
        return output.numpy()[:, : spec.sample_shape[0]]

    for step, timestep in enumerate(table.timesteps.tolist()):
        expected = network(states[step], timestep, conditioning.own)
        if guidance != 1.0:
            base = network(states[step], timestep, conditioning.unconditional)
            expected = base + np.float32(guidance) * (expected - base)
        np.testing.assert_allclose(read[step], expected, atol=2e-5)


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "tensorrt"])
def test_absorbed_factors_pass_the_check_and_lost_ones_do_not(
    tiny: Any, tmp_path: Path, target: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, graph, topology = tiny.checkpoint("labels"), tiny.float_graph("labels"), tiny.topology("labels")
    spread = {  # an alpha that no search would choose, so that every layer really has a factor
        name: ChannelFactors(
            np.exp2(np.arange(layers[0].in_channels) % 4).astype(np.float32), "for the test", 0.0
        )
        for name, layers in topology.groups().items()
    }  # fmt: skip
    statistics = tiny.statistics("labels")
    scaled = collect_scaled_inputs(
        checkpoint.unet, topology, tiny.calibration("labels"), statistics.timestep_edges,
        {name: found.inverse_k for name, found in spread.items() if found.inverse_k is not None},
    )  # fmt: skip
    statistics = dataclasses.replace(statistics, inputs={**statistics.inputs, **scaled})
    plan = make_plan(checkpoint.unet, topology, statistics, PlanOptions(ranges="minmax"), factors=spread)
    inputs = random_inputs(checkpoint.denoiser, 3)
    good = check_layers(checkpoint, plan, target, graph, inputs, tmp_path)
    assert good.ok, good
    absorbed = targets.absorb(graph.clone(), plan, target)
    assert absorbed.inputs
    assert absorbed.outputs
    # One that multiplies k into the readers and 1 / k nowhere: each layer alone still does what it should.
    monkeypatch.setattr(absorb, "_multiply", lambda model, path, name: None)
    bad = check_layers(checkpoint, plan, target, graph, inputs, tmp_path)
    assert not bad.ok
    assert bad.detail.startswith("with its factors k absorbed, the float graph: ")
