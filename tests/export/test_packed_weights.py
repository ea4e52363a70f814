"""Four-bit codes are stored in four bits where the runtime unpacks them itself, and compute the same."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qdm_deploy.artifacts.phase_sums import fits_phases
from qdm_deploy.artifacts.plan import TARGETS
from qdm_export.check import INTEGER_OPERATORS, check_onnx, integer_kernels
from qdm_export.shared_weights import save_with_shared_weights
from qdm_export.targets import FORMS, emit


def codes(model: ir.Model) -> list[ir.Value]:
    return [value for name, value in model.graph.initializers.items() if name.endswith("/weight_codes")]


@pytest.mark.parametrize("target", TARGETS)
def test_codes_have_the_type_that_the_target_takes(tiny: Any, target: Any) -> None:
    plan = tiny.plan("text", weight_bits=4)
    model = emit(tiny.float_graph("text"), plan, target).model
    packed = FORMS[target].packed_weights
    assert packed == (target != "tensorrt")
    found = codes(model)
    assert len(found) == len(plan.quantized)
    for value in found:
        assert value.const_value is not None
        assert value.dtype == value.const_value.dtype == (ir.DataType.INT4 if packed else ir.DataType.INT8)
        assert value.const_value.nbytes == value.const_value.size // (2 if packed else 1)
    kinds = Counter(node.op_type for node in model.graph if (node.name or "").endswith("/unpack_weight"))
    assert kinds["Cast"] == (len(found) if packed else 0)


def test_codes_of_eight_bits_are_never_packed(tiny: Any, emitted: Any) -> None:
    for target in TARGETS:
        assert {value.dtype for value in codes(emitted.graph("labels", target))} == {ir.DataType.INT8}


def test_a_packed_graph_runs_on_integers_and_computes_what_int8_codes_do(
    tiny: Any, emitted: Any, run_graph: Any, open_session: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = tiny.plan("text", weight_bits=4)
    model = emit(tiny.float_graph("text"), plan, "onnxruntime").model
    monkeypatch.setitem(FORMS, "onnxruntime", replace(FORMS["onnxruntime"], packed_weights=False))
    wide = emit(tiny.float_graph("text"), plan, "onnxruntime").model
    feeds = emitted.feeds("text", 3)
    for (name, value), expected in zip(run_graph(model, feeds).items(), run_graph(wide, feeds).values(), strict=True):
        np.testing.assert_array_equal(value, expected, err_msg=name)
    path = tmp_path / "optimized.onnx"
    open_session(model, optimized=path)
    planned = Counter(layer.layer.kind for layer in plan.quantized)
    found = integer_kernels(path)
    assert found["QLinearConv"] == planned["conv"] + 3 * sum(map(fits_phases, plan.quantized))
    assert sum(found[op] for op in INTEGER_OPERATORS if op != "QLinearConv") == planned["linear"]


def test_openvino_runs_packed_codes_on_integers(tiny: Any, emitted: Any, run_graph: Any, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    plan = tiny.plan("labels", weight_bits=4)
    model = emit(tiny.float_graph("labels"), plan, "openvino").model
    save_with_shared_weights([(tmp_path / "openvino.onnx", model)], tmp_path / "weights.bin")
    compiled = openvino.Core().compile_model(
        str(tmp_path / "openvino.onnx"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    kernels = [
        str(operation.get_rt_info()["primitiveType"].value)
        for operation in compiled.get_runtime_model().get_ops()
        if str(operation.get_rt_info()["layerType"].value) in ("Convolution", "FullyConnected")
    ]
    assert sum(kernel.endswith("I8") for kernel in kernels) >= len(plan.quantized)


def test_shared_weights_hold_both_types(tiny: Any, emitted: Any, run_graph: Any, tmp_path: Path) -> None:
    plan = tiny.plan("labels", weight_bits=4)
    graphs = {tmp_path / f"{target}.onnx": emit(tiny.float_graph("labels"), plan, target).model for target in TARGETS}
    feeds = emitted.feeds("labels", 2)
    before = {path: run_graph(model, feeds) for path, model in graphs.items()}
    save_with_shared_weights(graphs.items(), tmp_path / "weights.bin")
    for path in graphs:
        check_onnx(path)
        for key, value in run_graph(path, feeds).items():
            np.testing.assert_array_equal(value, before[path][key])
    codes_bytes = sum(layer.codes.size for layer in plan.quantized if not fits_phases(layer))
    both = sum(
        value.const_value.nbytes
        for path in list(graphs)[:2]
        for name, value in graphs[path].graph.initializers.items()
        if name.endswith("/weight_codes") and "/phase_" not in name and value.const_value is not None
    )
    assert both == codes_bytes  # twice half a byte for every code
    # Stored once for the two targets that pack, and once in INT8 for the one that does not.
    only_packed = {tmp_path / path.name: model for path, model in graphs.items() if path.stem != "tensorrt"}
    save_with_shared_weights(only_packed.items(), tmp_path / "packed.bin")
    wide = {tmp_path / f"{t}.wide.onnx": emitted.graph("labels", t).clone() for t in ("onnxruntime", "openvino")}
    save_with_shared_weights(wide.items(), tmp_path / "wide.bin")
    assert (tmp_path / "wide.bin").stat().st_size - (tmp_path / "packed.bin").stat().st_size > 0.45 * codes_bytes
