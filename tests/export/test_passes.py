"""Each pass alone on small graphs: what it inserts, that it runs once, that the function is what it should be."""

from collections import Counter
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from qdm_deploy.artifacts.plan import QuantizationPlan
from qdm_deploy.errors import ExportError
from qdm_export.passes.channel_factors import ChannelFactors
from qdm_export.passes.quantize_inputs import QuantizeInputs
from qdm_export.passes.quantize_weights import QuantizeWeights
from qdm_export.passes.step_gains import StepGains
from qdm_export.passes.time_table import TimeTable
from qdm_export.passes.zero_offsets import ZeroOffsets, offset_map

Array = NDArray[Any]
K = np.array([8.0, 1.0, 0.5, 2.0], dtype=np.float32)
R = np.array([1.0, 0.25], dtype=np.float32)


def signed_channel_factors(plan: QuantizationPlan) -> ChannelFactors:
    return ChannelFactors(plan, unsigned=False)


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph if node.op_type != "Identity"]


def feeds(graph: Any, batch: int = 3) -> dict[str, Array]:
    shape = [int(size) for size in list(graph.x.shape)[1:]]
    x = np.random.default_rng(8).normal(size=(batch, *shape)).astype(np.float32) * 3
    return {"x": x, "timestep": np.array([0, 399, 400, 999, 10][:batch])}


def conv(x: Array, weight: Array, stride: int, pad: int) -> Array:
    x = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    k = weight.shape[2]
    h, w = ((n - k) // stride + 1 for n in x.shape[2:])
    y = np.zeros((len(x), len(weight), h, w))
    for i in range(h):
        for j in range(w):
            patch = x[:, :, i * stride : i * stride + k, j * stride : j * stride + k]
            y[:, :, i, j] = np.einsum("bcij,ocij->bo", patch, weight.astype(np.float64))
    return y


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(signed_channel_factors, id="ChannelFactors"),
        pytest.param(lambda plan: StepGains(plan), id="StepGains"),
        pytest.param(lambda plan: QuantizeWeights(plan, packed=True), id="QuantizeWeights"),
        pytest.param(lambda plan: ZeroOffsets(plan), id="ZeroOffsets"),
        pytest.param(lambda plan: QuantizeInputs(plan, unsigned=True), id="QuantizeInputs-u8"),
        pytest.param(lambda plan: QuantizeInputs(plan, unsigned=False), id="QuantizeInputs-s8"),
    ],
)
def test_a_second_run_changes_nothing(small: Any, make: Any) -> None:
    graph = small((4, 6, 5))
    graph.output(graph.conv(inverse_k=K, inverse_r=R, zero_offset=50))
    first = make(graph.plan)(graph.model)
    assert first.modified
    assert first.model is graph.model
    before = operators(graph.model), list(graph.graph.initializers)
    second = make(graph.plan)(graph.model)
    assert not second.modified
    assert (operators(graph.model), list(graph.graph.initializers)) == before


@pytest.mark.parametrize("make", [signed_channel_factors, StepGains, ZeroOffsets])
def test_a_pass_without_work_says_so(small: Any, make: Any) -> None:
    graph = small((4, 6, 5))
    graph.output(graph.conv())
    assert not make(graph.plan)(graph.model).modified
    assert operators(graph.model) == ["Conv"]


def test_the_plan_must_be_of_the_graph(small: Any) -> None:
    graph, other = small((4, 6, 5)), small((4, 6, 5))
    graph.output(graph.conv("conv"))
    other.output(other.conv("elsewhere"))
    with pytest.raises(
        ExportError, match=r"the plan is not of this graph: 1 of its layers are not in it \(first: elsewhere\)"
    ):
        signed_channel_factors(other.plan)(graph.model)


# ------------------------------------------------------------------------------------------------------ channel factors


@pytest.mark.parametrize("kind", ["conv", "Gemm", "MatMul"])
def test_channel_factors_with_w_times_k_keep_the_function(small: Any, run_graph: Any, kind: str) -> None:
    graph = small((4, 6, 5) if kind == "conv" else ((4,) if kind == "Gemm" else (7, 4)))
    graph.output(graph.conv(inverse_k=K) if kind == "conv" else graph.linear(kind=kind, inverse_k=K))
    given = feeds(graph)
    (before,) = run_graph(graph.model, given, optimize=False).values()
    signed_channel_factors(graph.plan)(graph.model)
    assert operators(graph.model)[0] == "Mul"
    (half,) = run_graph(graph.model, given, optimize=False).values()
    assert np.abs(before - half).max() > 1  # without W * k it is another function
    QuantizeWeights(graph.plan)(graph.model)
    (after,) = run_graph(graph.model, given, optimize=False).values()
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-4 * np.abs(before).max())


def test_channel_factors_stand_on_the_path_into_their_layer_only(small: Any) -> None:
    graph = small((4, 6, 5))
    graph.output(graph.conv("a", inverse_k=K))
    graph.output(graph.conv("b", group="a", inverse_k=K))
    graph.output(graph.node("Sigmoid", [graph.x], [4, 6, 5]))
    signed_channel_factors(graph.plan)(graph.model)
    counts = Counter(operators(graph.model))
    assert counts["Mul"] == 1  # shared by both readers
    sigmoid = next(node for node in graph.graph if node.op_type == "Sigmoid")
    assert sigmoid.inputs[0] is graph.x


# ----------------------------------------------------------------------------------------------------------- step gains


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["conv", "Gemm", "MatMul", "sequence"])
def test_step_gains_keep_the_function(small: Any, run_graph: Any, kind: str, bias: bool) -> None:
    graph = small({"conv": (4, 6, 5), "Gemm": (4,), "MatMul": (7, 4), "sequence": (2, 7, 4)}[kind])
    make = graph.conv if kind == "conv" else graph.linear
    arguments = {} if kind == "conv" else {"kind": "Gemm" if kind == "Gemm" else "MatMul"}
    graph.output(make(bias=bias, inverse_r=R, **arguments))
    given = feeds(graph, 5)
    (before,) = run_graph(graph.model, given, optimize=False).values()
    assert StepGains(graph.plan)(graph.model).modified
    (after,) = run_graph(graph.model, given, optimize=False).values()
    assert after.shape == before.shape
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5 * np.abs(before).max())
    assert Counter(operators(graph.model))["Gather"] == 3  # the row's bin, r and 1 / r


def test_each_row_is_scaled_by_the_gain_of_its_timestep(small: Any, run_graph: Any) -> None:
    graph = small((4, 6, 5))
    graph.output(graph.conv(inverse_r=R))
    StepGains(graph.plan)(graph.model)
    scaled = next(node.outputs[0] for node in graph.graph if node.name == "conv/scale_step")
    graph.graph.outputs.append(scaled)
    given = feeds(graph, 4)
    found = run_graph(graph.model, given, optimize=False)[scaled.name]
    for row, inverse in enumerate([1.0, 1.0, 0.25, 0.25]):  # the bins meet at 400
        np.testing.assert_array_equal(found[row], given["x"][row] * np.float32(inverse))


def test_one_bin_lookup_serves_all_layers(small: Any) -> None:
    graph = small((4, 6, 5))
    graph.output(graph.conv("a", inverse_r=R))
    graph.output(graph.conv("b", group="a", inverse_r=R))
    StepGains(graph.plan)(graph.model)
    assert sum(node.name == "step_bin" for node in graph.graph) == 1
    assert Counter(operators(graph.model))["Gather"] == 3
    assert sum(node.name.endswith("/scale_step") for node in graph.graph) == 1


def test_gains_need_the_timestep(small: Any) -> None:
    graph = small((4, 6, 5))
    graph.output(graph.conv(inverse_r=R))
    graph.graph.inputs.remove(graph.t)
    with pytest.raises(ExportError, match="the graph has no timestep input to look anything up by"):
        StepGains(graph.plan)(graph.model)


# --------------------------------------------------------------------------------------------------------- zero offsets


@pytest.mark.parametrize("offset", [-127, 60, 128])
@pytest.mark.parametrize(
    ("kernel", "stride", "pad"), [(3, 1, 1), (3, 2, 1), (1, 1, 0), (3, 1, 0), (1, 1, 1), (5, 2, 2), (5, 3, 1)]
)
def test_the_offset_map_is_the_convolution_of_a_constant(
    small: Any, offset: int, kernel: int, stride: int, pad: int
) -> None:
    graph = small((4, 7, 6))
    graph.conv(kernel=kernel, stride=stride, pad=pad, zero_offset=offset)
    (plan,) = graph.plans
    constant = np.full((1, 4, 7, 6), offset * plan.scale)
    expected = conv(constant, graph.weights["conv"], stride, pad)
    found = offset_map(plan, offset * plan.scale)
    if pad:
        np.testing.assert_allclose(found, expected, atol=1e-9 * np.abs(expected).max())
    else:
        assert found.shape == (3,)
        np.testing.assert_allclose(np.broadcast_to(found.reshape(1, 3, 1, 1), expected.shape), expected, rtol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("kernel", "stride", "pad"), [(3, 1, 1), (3, 2, 1), (1, 1, 0)])
def test_zero_offsets_keep_the_convolution(
    small: Any, run_graph: Any, kernel: int, stride: int, pad: int, bias: bool
) -> None:
    graph = small((4, 7, 6))
    graph.output(graph.conv(kernel=kernel, stride=stride, pad=pad, bias=bias, zero_offset=77))
    given = feeds(graph)
    before = conv(given["x"], graph.weights["conv"], stride, pad)
    before = before + (graph.biases["conv"].reshape(1, -1, 1, 1) if bias else 0)
    assert ZeroOffsets(graph.plan)(graph.model).modified
    (after,) = run_graph(graph.model, given, optimize=False).values()
    np.testing.assert_allclose(after, before, atol=2e-6 * 77 * np.abs(before).max())
    merged = not pad and bias
    assert operators(graph.model) == (["Sub", "Conv"] if merged else ["Sub", "Conv", "Add"])


def test_the_offset_that_half_precision_takes_away_is_added_back(small: Any, run_graph: Any) -> None:
    """z s of 77 * 0.0123 has more bits than float16: what is subtracted is rounded, so what is added is too."""
    graph = small((4, 7, 6))
    graph.output(graph.conv(zero_offset=77, scale=float(np.float16(0.0123))))
    given = feeds(graph)
    (before,) = run_graph(graph.model, given, optimize=False).values()
    ZeroOffsets(graph.plan, np.dtype(np.float16))(graph.model)
    (offset,) = (v.const_value.numpy() for n, v in graph.model.graph.initializers.items() if n.endswith("/offset"))
    assert offset == np.float16(offset) != np.float32(77) * np.float32(graph.plans[0].scale)
    (after,) = run_graph(graph.model, given, optimize=False).values()
    np.testing.assert_allclose(after, before, atol=1e-5 * np.abs(before).max())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["Gemm", "MatMul"])
def test_zero_offsets_keep_the_matrix_product(small: Any, run_graph: Any, kind: str, bias: bool) -> None:
    graph = small((4,) if kind == "Gemm" else (5, 4))
    graph.output(graph.linear(kind=kind, bias=bias, zero_offset=-30))
    given = feeds(graph)
    (before,) = run_graph(graph.model, given, optimize=False).values()
    ZeroOffsets(graph.plan)(graph.model)
    (after,) = run_graph(graph.model, given, optimize=False).values()
    np.testing.assert_allclose(after, before, atol=1e-5 * np.abs(before).max())


@pytest.mark.parametrize("kind", ["conv", "Gemm", "MatMul"])
@pytest.mark.parametrize("pad", [0, 1])
def test_gains_and_offsets_together_keep_the_function(small: Any, run_graph: Any, kind: str, pad: int) -> None:
    graph = small({"conv": (4, 6, 5), "Gemm": (4,), "MatMul": (7, 4)}[kind])
    if kind == "conv":
        graph.output(graph.conv(pad=pad, zero_offset=40, inverse_r=R, inverse_k=K))
    else:
        graph.output(graph.linear(kind=kind, zero_offset=40, inverse_r=R, inverse_k=K))
    given = feeds(graph, 5)
    (before,) = run_graph(graph.model, given, optimize=False).values()
    for step in (signed_channel_factors, StepGains, QuantizeWeights, ZeroOffsets):
        step(graph.plan)(graph.model)
    (after,) = run_graph(graph.model, given, optimize=False).values()
    np.testing.assert_allclose(after, before, atol=2e-5 * np.abs(before).max())


# ------------------------------------------------------------------------------------------------- quantize, dequantize


def test_signed_inputs_are_quantized_once_and_dequantized_per_reader(small: Any) -> None:
    graph = small((4, 6, 5))
    graph.output(graph.conv("a"))
    graph.output(graph.conv("b", group="a"))
    QuantizeInputs(graph.plan, unsigned=False)(graph.model)
    assert Counter(operators(graph.model)) == {"QuantizeLinear": 1, "DequantizeLinear": 2, "Conv": 2}
    assert graph.graph.initializers["a/zero_point"].const_value.numpy() == np.int8(0)


def test_unsigned_inputs_have_a_pair_per_reader_and_the_offset_as_zero_point(small: Any, run_graph: Any) -> None:
    graph = small((4, 6, 5))
    graph.output(graph.conv("a", zero_offset=78))
    graph.output(graph.conv("b", group="a", zero_offset=78))
    QuantizeInputs(graph.plan, unsigned=True)(graph.model)
    assert Counter(operators(graph.model)) == {"QuantizeLinear": 2, "DequantizeLinear": 2, "Conv": 2}
    point = graph.graph.initializers["a/zero_point"].const_value.numpy()
    assert (point, point.dtype) == (50, np.uint8)
    codes = next(node.outputs[0] for node in graph.graph if node.op_type == "QuantizeLinear")
    graph.graph.outputs.append(codes)
    x = np.zeros((1, 4, 6, 5), dtype=np.float32)
    x[0, 0, 0] = [0.0625, 0.1875, -0.0625, 100.0, -100.0]  # 0.5, 1.5 and -0.5 steps of 0.125: half to even
    found = run_graph(graph.model, {"x": x, "timestep": np.array([0])}, optimize=False)[codes.name]
    assert found[0, 0, 0].tolist() == [50, 52, 50, 255, 0]


def test_behind_a_norm_unsigned_targets_quantize_per_axis_and_need_no_multiply(small: Any, run_graph: Any) -> None:
    graph = small((4, 6, 5))
    graph.output(graph.conv("a", zero_offset=78, inverse_k=K, normalized=True))
    assert not ChannelFactors(graph.plan, unsigned=True)(graph.model).modified
    QuantizeInputs(graph.plan, unsigned=True)(graph.model)
    assert Counter(operators(graph.model)) == {"QuantizeLinear": 1, "DequantizeLinear": 1, "Conv": 1}
    quantize, dequantize = list(graph.graph)[:2]
    assert dequantize.inputs[1].shape == ()  # the kernel knows one scale
    graph.graph.outputs.append(quantize.outputs[0])
    x = np.zeros((1, 4, 6, 5), dtype=np.float32)
    x[0, :, 0, 0] = 1.0  # 8 steps of 0.125
    codes = run_graph(graph.model, {"x": x, "timestep": np.array([0])}, optimize=False)[quantize.outputs[0].name]
    assert codes[0, :, 0, 0].tolist() == [50 + 64, 50 + 8, 50 + 4, 50 + 16]


@pytest.mark.parametrize("normalized", [True, False])
def test_a_factor_beside_a_gain_is_a_multiply(small: Any, run_graph: Any, normalized: bool) -> None:
    graph = small((4, 6, 5))
    graph.output(graph.conv("a", zero_offset=78, inverse_k=K, inverse_r=R, normalized=normalized))
    assert ChannelFactors(graph.plan, unsigned=True)(graph.model).modified
    StepGains(graph.plan)(graph.model)
    QuantizeInputs(graph.plan, unsigned=True)(graph.model)
    codes = next(node.outputs[0] for node in graph.graph if node.op_type == "QuantizeLinear")
    graph.graph.outputs.append(codes)
    x = np.zeros((2, 4, 6, 5), dtype=np.float32)
    x[:, :, 0, 0] = 1.0  # 8 steps of 0.125, or 2 in the later bin
    found = run_graph(graph.model, {"x": x, "timestep": np.array([0, 999])}, optimize=False)[codes.name]
    assert found[0, :, 0, 0].tolist() == [50 + 64, 50 + 8, 50 + 4, 50 + 16]
    assert found[1, :, 0, 0].tolist() == [50 + 16, 50 + 2, 50 + 1, 50 + 4]


def test_unsigned_targets_multiply_before_a_matrix_product(small: Any) -> None:
    graph = small((7, 4))
    graph.output(graph.linear(inverse_k=K, kind="MatMul"))
    assert ChannelFactors(graph.plan, unsigned=True)(graph.model).modified
    QuantizeInputs(graph.plan, unsigned=True)(graph.model)
    quantize = next(node for node in graph.graph if node.op_type == "QuantizeLinear")
    assert quantize.inputs[1].shape == ()


@pytest.mark.parametrize(("kind", "axis"), [("conv", 0), ("Gemm", 0), ("MatMul", 1)])
def test_weights_become_codes_in_the_layout_of_their_node(small: Any, run_graph: Any, kind: str, axis: int) -> None:
    graph = small((4, 6, 5) if kind == "conv" else (5, 4) if kind == "MatMul" else (4,))
    graph.output(graph.conv() if kind == "conv" else graph.linear(kind=kind))
    given = feeds(graph)
    (before,) = run_graph(graph.model, given, optimize=False).values()
    QuantizeWeights(graph.plan)(graph.model)
    node = next(node for node in graph.graph if node.op_type == "DequantizeLinear")
    assert node.attributes["axis"].as_int() == axis
    assert node.inputs[0].dtype == ir.DataType.INT8
    (after,) = run_graph(graph.model, given, optimize=False).values()
    np.testing.assert_allclose(after, before, atol=1e-5 * np.abs(before).max())


# ------------------------------------------------------------------------------------------------------- the time table


def test_the_time_table_is_made_once(tiny: Any) -> None:
    model = tiny.float_graph("rgb").clone()
    assert not TimeTable(1000)(model).modified


def test_a_time_table_needs_a_timestep(small: Any) -> None:
    graph = small((4, 6, 5))
    graph.output(graph.conv())
    graph.graph.inputs.remove(graph.t)
    with pytest.raises(ExportError, match="the graph has no timestep input to make a table of"):
        TimeTable(10)(graph.model)
