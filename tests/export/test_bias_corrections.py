"""Corrected biases in every target: with k, r and z, on layers with and without a bias."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from qdm_calibration.simulate import quantized_layer
from qdm_deploy.artifacts.phase_sums import upsampled
from qdm_deploy.artifacts.plan import TARGETS, QuantizationPlan
from qdm_export.check import layer_endpoints, with_outputs
from qdm_export.passes.bias_corrections import BiasCorrections
from qdm_export.targets import emit


def sqnr_db(reference: Any, value: Any) -> float:
    noise = ((reference.astype(np.float64) - value) ** 2).sum()
    return float(10 * np.log10((reference.astype(np.float64) ** 2).sum() / max(noise, 1e-30)))


def with_corrections(plan: QuantizationPlan) -> QuantizationPlan:
    generator = np.random.default_rng(0)
    return replace(
        plan,
        layers=tuple(
            replace(
                layer,
                bias_correction=(
                    127 * layer.scale * layer.weight_scales * generator.normal(scale=2, size=layer.layer.out_channels)
                ).astype(np.float32),
            )
            if layer.precision == "int8"
            else layer
            for layer in plan.layers
        ),
    )


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["labels", "text"])
def test_every_layer_has_its_correction_behind_gain_and_offset(
    emitted: Any, tiny: Any, run_graph: Any, name: str, target: Any
) -> None:
    plan, network = with_corrections(tiny.plan(name)), tiny.checkpoint(name).unet
    graph = emit(tiny.float_graph(name), plan, target, rest="fp32").model
    endpoints = layer_endpoints(graph, plan)
    feeds = emitted.feeds(name, 3, seed=7)
    feeds["timestep"] = np.array([5, 400, 990])
    values = run_graph(with_outputs(graph, [n for e in endpoints for n in (e.data, e.result)]), feeds)
    bins = torch.from_numpy(plan.bin_of_timestep()[feeds["timestep"]])
    biased = 0
    for item in endpoints:
        module, entry = network.get_submodule(f"unet.{item.name}"), plan.layer(item.name)
        biased += module.bias is not None

        def simulated(entry: Any, module: Any = module, item: Any = item) -> Any:
            layer = quantized_layer(module, entry, target, dtype=torch.float64)
            layer.time_bin = bins
            with torch.inference_mode():
                return layer(torch.from_numpy(upsampled(values[item.data], entry.layer))).numpy()

        exact = entry.output_scale is None or target != "onnxruntime"
        assert sqnr_db(simulated(entry), values[item.result]) > (80 if exact else 30), item.name
        uncorrected = simulated(replace(entry, bias_correction=None))
        difference = (values[item.result] - uncorrected).astype(np.float64)
        if exact:
            channels = (0, 2, 3) if entry.layer.kind == "conv" else tuple(range(difference.ndim - 1))
            np.testing.assert_allclose(
                difference.mean(axis=channels), entry.bias_correction, atol=1e-4 * np.abs(entry.bias_correction).max()
            )
    assert biased > 0
    assert name != "text" or biased < len(endpoints)  # attention projections without a bias get one


@pytest.mark.parametrize(
    ("kind", "bias"), [("conv", True), ("conv", False), ("Gemm", False), ("MatMul", True), ("MatMul", False)]
)
def test_the_correction_is_added_to_the_output(small: Any, run_graph: Any, kind: str, bias: bool) -> None:
    graph = small((4, 6, 5) if kind == "conv" else (5, 4) if kind == "MatMul" else (4,))
    correction = np.array([3.0, -2.0, 0.5], dtype=np.float32)
    make = (
        (lambda **given: graph.conv(**given)) if kind == "conv" else (lambda **given: graph.linear(kind=kind, **given))
    )
    graph.output(make(bias=bias, bias_correction=correction))
    feeds = {
        "x": np.random.default_rng(0).normal(size=(2, *list(graph.x.shape)[1:])).astype(np.float32),
        "timestep": np.zeros(2, dtype=np.int64),
    }
    (before,) = run_graph(graph.model, feeds, optimize=False).values()
    assert BiasCorrections(graph.plan)(graph.model).modified
    assert not BiasCorrections(graph.plan)(graph.model).modified
    (after,) = run_graph(graph.model, feeds, optimize=False).values()
    shape = (-1, 1, 1) if kind == "conv" else (-1,)
    np.testing.assert_allclose(after - before, np.broadcast_to(correction.reshape(shape), after.shape), atol=1e-3)
