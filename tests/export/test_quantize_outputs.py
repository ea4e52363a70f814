"""Output grids for ONNX Runtime: where they stand, one per channel or one for all, and what does not fit."""

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from qdm_deploy.errors import ExportError
from qdm_export.passes.quantize_outputs import QuantizeOutputs
from qdm_export.passes.quantize_weights import QuantizeWeights
from qdm_export.passes.step_gains import StepGains

R = np.array([1.0, 0.25], dtype=np.float32)


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph if node.op_type != "Identity"]


def feeds(graph: Any) -> dict[str, NDArray[Any]]:
    shape = [int(size) for size in list(graph.x.shape)[1:]]
    x = np.random.default_rng(8).normal(size=(3, *shape)).astype(np.float32) * 3
    return {"x": x, "timestep": np.array([0, 399, 999])}


def test_outputs_are_quantized_behind_the_kernel_and_before_the_gain(small: Any) -> None:
    graph = small((4, 6, 5))
    graph.output(graph.conv(bias=True, inverse_r=R))
    for step in (StepGains, QuantizeWeights, QuantizeOutputs):
        step(graph.plan)(graph.model)
    order = [op for op in operators(graph.model) if op not in ("Gather",)]
    dequantized = ["DequantizeLinear"] * 2  # weight, and the bias that holds the zero points
    assert order == ["Mul", *dequantized, "Conv", "QuantizeLinear", "DequantizeLinear", "Mul", "Add"]


@pytest.mark.parametrize("bias", [True, False])
def test_outputs_of_each_channel_use_their_own_grid(small: Any, run_graph: Any, bias: bool) -> None:
    graph = small((4, 6, 5))
    scales = np.array([0.5, 8.0, 0.03125], dtype=np.float32)
    zero_points = np.array([128, 3, 250], dtype=np.uint8)
    graph.output(graph.conv(bias=bias, output_scale=scales, output_zero_point=zero_points))
    plain = graph.model.clone()
    QuantizeWeights(graph.plan)(plain)
    QuantizeWeights(graph.plan)(graph.model)
    QuantizeOutputs(graph.plan)(graph.model)
    (expected,) = run_graph(plain, feeds(graph), optimize=False).values()
    (found,) = run_graph(graph.model, feeds(graph), optimize=False).values()
    step, zero = scales.reshape(1, -1, 1, 1), zero_points.astype(np.float32).reshape(1, -1, 1, 1)
    inside = np.clip(expected, -zero * step, (255 - zero) * step)
    # Half a step of rounding, and half a unit of the bias, which is a whole number of products.
    unit = (graph.plans[0].weight_scales * graph.plans[0].scale).reshape(1, -1, 1, 1)
    assert (np.abs(found - inside) <= 0.501 * step + 0.5 * unit).all()
    codes = found / step + zero
    np.testing.assert_allclose(codes, np.rint(codes), atol=1e-3)
    # Channels with one grid keep a scalar, which most kernels are faster with.
    shared = small((4, 6, 5))
    shared.output(shared.conv(output_scale=np.full(3, 0.5, np.float32), output_zero_point=np.full(3, 90, np.uint8)))
    for step_ in (QuantizeWeights, QuantizeOutputs):
        step_(shared.plan)(shared.model)
    assert shared.graph.initializers["conv/output_scale"].shape == ()
    assert graph.graph.initializers["conv/output_scale"].shape == (3,)


def test_bias_and_zero_points_become_int32_in_units_of_the_product(small: Any) -> None:
    graph = small((4, 6, 5))
    graph.output(graph.conv(out=16))
    QuantizeWeights(graph.plan)(graph.model)
    QuantizeOutputs(graph.plan)(graph.model)
    (plan,) = graph.plans
    codes = graph.graph.initializers["conv/bias_codes"].const_value.numpy()
    assert codes.dtype == np.int32
    shift = (plan.output_zero_point.astype(np.float32) - 128) * plan.output_scale
    unit = plan.weight_scales * np.float32(plan.scale)
    np.testing.assert_array_equal(codes, np.rint((graph.biases["conv"] + shift) / unit))


def test_a_bias_that_does_not_fit_is_refused(small: Any) -> None:
    graph = small((4, 6, 5))
    graph.output(graph.conv(scale=2.0**-14, weight_scale=np.full(3, 2.0**-14, dtype=np.float32)))
    node = next(iter(graph.graph))
    node.replace_input_with(2, graph.constant("huge", np.full(3, 100.0, dtype=np.float32)))
    QuantizeWeights(graph.plan)(graph.model)
    with pytest.raises(ExportError, match=r"the bias of conv does not fit 32 bits at scale 6\.1e-05"):
        QuantizeOutputs(graph.plan)(graph.model)


def test_outputs_before_weights_are_refused(small: Any) -> None:
    graph = small((4, 6, 5))
    graph.output(graph.conv())
    with pytest.raises(ir.passes.PreconditionError, match="the weight of conv is not quantized yet"):
        QuantizeOutputs(graph.plan)(graph.model)


def test_a_plan_without_output_scales_is_refused(small: Any) -> None:
    graph = small((4, 6, 5))
    graph.output(graph.conv(output_scale=None))
    QuantizeWeights(graph.plan)(graph.model)
    with pytest.raises(ExportError, match="the plan has no output scale for conv, which the onnxruntime target needs"):
        QuantizeOutputs(graph.plan)(graph.model)


def test_a_second_run_leaves_quantized_outputs_alone(small: Any) -> None:
    graph = small((4, 6, 5))
    graph.output(graph.conv(zero_offset=50))
    QuantizeWeights(graph.plan)(graph.model)
    assert QuantizeOutputs(graph.plan)(graph.model).modified
    before = operators(graph.model), list(graph.graph.initializers)
    assert not QuantizeOutputs(graph.plan)(graph.model).modified
    assert (operators(graph.model), list(graph.graph.initializers)) == before
