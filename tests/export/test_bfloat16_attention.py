"""Large attention in bfloat16 on OpenVINO: the two products and what stands between them, and no small one."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qdm_deploy.backends.openvino.graph import compile_graph, import_openvino, read_graph
from qdm_deploy.runtime.cpu import cpu_flags
from qdm_export.passes.bfloat16_attention import Bfloat16Attention
from qdm_export.targets import FORMS, emit


def attentions(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == "Softmax"]


def cast(tiny: Any, name: str, least_scores: int) -> ir.Model:
    form = replace(FORMS["openvino"], least_scores=least_scores)
    return emit(tiny.float_graph(name), tiny.plan(name), "openvino", form=form).model


@pytest.mark.parametrize("name", ["labels", "text"])
def test_scores_softmax_and_result_are_bfloat16_and_nothing_else(tiny: Any, name: str) -> None:
    model = cast(tiny, name, 1)
    assert attentions(model)
    half = {value for node in model.graph for value in node.outputs if value.dtype == ir.DataType.BFLOAT16}
    for node in attentions(model):
        (reader,) = node.outputs[0].uses()
        assert {node.inputs[0], node.outputs[0], reader.node.outputs[0], *reader.node.inputs} <= half
    kinds = Counter(value.producer().op_type for value in half)
    assert kinds.keys() == {"Cast", "MatMul", "Softmax", "Transpose"}
    # Query, key and value are cast, and then turned, right before their products.
    assert kinds["Cast"] == kinds["Transpose"] == 3 * len(attentions(model))
    assert kinds["MatMul"] == 2 * kinds["Softmax"] == 2 * len(attentions(model))
    assert model.graph.opset_imports[""] == 22
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert not Bfloat16Attention(1)(model).modified


def test_small_attention_is_left_alone(tiny: Any, emitted: Any) -> None:
    graph = emitted.graph("labels", "openvino")
    largest = max(node.outputs[0].shape[-2] for node in attentions(graph)) ** 2
    assert all(node.outputs[0].dtype == ir.DataType.FLOAT for node in attentions(graph))
    for least, found in ((largest + 1, False), (largest, True)):
        graph = cast(tiny, "labels", least)
        assert any(node.outputs[0].dtype == ir.DataType.BFLOAT16 for node in attentions(graph)) == found


@pytest.mark.parametrize("name", ["labels", "text"])
def test_openvino_computes_nearly_the_same(tiny: Any, emitted: Any, tmp_path: Path, name: str) -> None:
    pytest.importorskip("openvino")
    feeds, path = emitted.feeds(name, 3, seed=4), tmp_path / "graph.onnx"
    results = []
    for least_scores, flags in ((1 << 40, cpu_flags()), (1, cpu_flags()), (1, frozenset[str]())):
        onnx.save(ir.to_proto(cast(tiny, name, least_scores)), path)
        compiled = compile_graph(import_openvino().Core(), read_graph(path, flags), {"INFERENCE_PRECISION_HINT": "f32"})
        wanted = {item.any_name for item in compiled.inputs}
        given = {key: value for key, value in feeds.items() if key in wanted}
        results.append(np.array(compiled(given)["next_sample"], dtype=np.float64))
    whole, halved, widened = results
    np.testing.assert_allclose(widened, whole, atol=1e-5 * np.abs(whole).max())
    assert 10 * np.log10((whole**2).sum() / max(((halved - whole) ** 2).sum(), 1e-30)) > 35
