"""The types of the half-precision target: half around the kernels, float32 for time and sampler, no Cast in between."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qdm_deploy.errors import ExportError
from qdm_export.check import check_onnx, widened
from qdm_export.float_graph import save_graph
from qdm_export.passes.half_precision import HalfPrecision

FLOAT16, BFLOAT16, FLOAT = ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT
KERNELS = ("Conv", "MatMul", "Gemm")


@pytest.fixture(params=["fp16", "bf16"])
def rest(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def half(rest: str) -> ir.DataType:
    return {"fp16": FLOAT16, "bf16": BFLOAT16}[rest]


@pytest.fixture(params=["labels", "rgb", "text", "variance"])
def model(request: pytest.FixtureRequest, emitted: Any, rest: Any) -> ir.Model:
    return emitted.graph(request.param, "tensorrt", rest=rest)


def test_no_cast_stands_between_codes_and_kernel(model: ir.Model, half: ir.DataType) -> None:
    for node in model.graph:
        if node.op_type == "QuantizeLinear":
            assert node.inputs[0].dtype == node.inputs[1].dtype == half
            for use in node.outputs[0].uses():
                assert use.node.op_type == "DequantizeLinear"
        if node.op_type == "DequantizeLinear":
            assert node.inputs[1].dtype == node.outputs[0].dtype == half
            assert {use.node.op_type for use in node.outputs[0].uses()} <= set(KERNELS)


def test_planned_kernels_are_half(model: ir.Model, half: ir.DataType) -> None:
    planned = [
        n
        for n in model.graph
        if n.op_type in KERNELS and n.inputs[0].producer() and n.inputs[0].producer().op_type == "DequantizeLinear"
    ]
    assert len(planned) >= 12
    for node in planned:
        assert {value.dtype for value in (*node.inputs, *node.outputs) if value is not None} == {half}


def test_resize_keeps_float32_scales(emitted: Any, rest: Any, half: ir.DataType) -> None:
    found = [n for n in emitted.graph("labels", "tensorrt", rest=rest).graph if n.op_type == "Resize"]
    assert found
    for node in found:
        assert node.inputs[0].dtype == node.outputs[0].dtype == half
        assert node.inputs[2] is None or node.inputs[2].dtype == FLOAT


def test_time_and_sampler_stay_float32(model: ir.Model) -> None:
    looked_up = [node for node in model.graph if node.name == "time_embedding"]
    time_path = [n for n in model.graph if "time_emb" in n.metadata_props.get("qdm.module", "") and n.op_type == "Gemm"]
    projections = [n for n in time_path if "time_emb_proj" in n.metadata_props["qdm.module"]]
    assert projections
    assert looked_up or len(time_path) > len(projections)  # computed, where timesteps may lie between two
    assert all(node.outputs[0].dtype == FLOAT for node in looked_up)
    assert all(value.dtype == FLOAT for n in time_path for value in (*n.inputs, *n.outputs))
    assert all(value.dtype == FLOAT for value in model.graph.outputs)
    assert all(value.dtype in (FLOAT, ir.DataType.INT64) for value in model.graph.inputs)
    for node in model.graph:
        if "qdm.module" not in node.metadata_props and node.op_type in ("Mul", "Add", "Sub", "Min", "Max", "Exp"):
            assert {value.dtype for value in (*node.inputs, *node.outputs)} == {FLOAT}, node.name


def test_every_operator_gets_one_float_type(model: ir.Model, half: ir.DataType) -> None:
    for node in model.graph:
        if node.op_type in ("Cast", "Resize", "Gather", "Shape"):
            continue
        types = {
            value.dtype for value in (*node.inputs, *node.outputs) if value is not None and value.dtype in (half, FLOAT)
        }
        assert len(types) <= 1, (node.name, node.op_type)


def test_a_second_run_changes_nothing(emitted: Any, rest: Any) -> None:
    model = emitted.graph("variance", "tensorrt", rest=rest).clone()
    before = [(n.op_type, n.name) for n in model.graph]
    assert not HalfPrecision()(model).modified
    assert not HalfPrecision(BFLOAT16)(model).modified
    assert [(n.op_type, n.name) for n in model.graph] == before


def test_a_constant_that_float16_cannot_hold_is_refused(tiny: Any) -> None:
    model = tiny.float_graph("variance").clone()
    value = next(v for v in model.graph.initializers.values() if v.name and v.name.endswith("conv_in.weight"))
    value.const_value = ir.tensor(np.full(tuple(value.shape), 1e6, dtype=np.float32), name=value.name)
    with pytest.raises(ExportError, match=r"conv_in\.weight holds 1e\+06, which float16 cannot hold"):
        HalfPrecision()(model)
    HalfPrecision(BFLOAT16)(model)
    assert next(v for name, v in model.graph.initializers.items() if name.endswith("conv_in.weight/bfloat16"))


def test_a_bfloat16_graph_is_valid_onnx_of_a_later_opset(emitted: Any, tmp_path: Path) -> None:
    model = emitted.graph("labels", "tensorrt", rest="bf16")
    assert model.graph.opset_imports[""] == 22
    save_graph(model, tmp_path / "bf16.onnx", weights="bf16.data")
    check_onnx(tmp_path / "bf16.onnx")


def test_a_widened_graph_keeps_the_constants_and_has_no_bfloat16(emitted: Any, tmp_path: Path) -> None:
    model = emitted.graph("labels", "tensorrt", rest="bf16")
    save_graph(model, tmp_path / "bf16.onnx", weights="bf16.data")
    wide = widened(tmp_path / "bf16.onnx")
    save_graph(wide, tmp_path / "wide.onnx", weights="wide.data")
    check_onnx(tmp_path / "wide.onnx")
    values = [*wide.graph.initializers.values(), *(value for node in wide.graph for value in node.outputs)]
    assert BFLOAT16 not in {value.dtype for value in values}
    halves = {name: v for name, v in model.graph.initializers.items() if v.dtype == BFLOAT16}
    assert len(halves) > 50
    for name, value in halves.items():
        found = wide.graph.initializers[name].const_value
        assert found is not None
        np.testing.assert_array_equal(found.numpy(), value.const_value.numpy().astype(np.float32))
