"""Products of u8 and s8 codes are exact at the ends of both ranges, where two of them leave 16 bits."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qdm_deploy.building.checks import run_graph
from qdm_export.passes.quantize_inputs import QuantizeInputs
from qdm_export.passes.quantize_outputs import QuantizeOutputs
from qdm_export.passes.quantize_weights import QuantizeWeights

CHANNELS, OUT = 64, 16


@pytest.mark.parametrize("kind", ["conv", "linear"])
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_the_largest_products_are_exact(small: Any, tmp_path: Path, backend: str, kind: str) -> None:
    pytest.importorskip(backend)
    if kind == "conv":
        graph = small((CHANNELS, 5, 5))
        codes = np.full((OUT, CHANNELS, 3, 3), 127)
        grids = {"output_scale": np.full(OUT, 2500, np.float32), "output_zero_point": np.zeros(OUT, np.uint8)}
        graph.output(graph.conv(out=OUT, pad=0, bias=False, weight_codes=codes.astype(np.int8), **grids))
    else:
        graph = small((9, CHANNELS))
        graph.output(
            graph.linear(out=OUT, kind="MatMul", bias=False, weight_codes=np.full((OUT, CHANNELS), 127, np.int8))
        )
    # ONNX Runtime multiplies integers where a convolution's result is quantized too.
    outputs = [QuantizeOutputs(graph.plan)] if backend == "onnxruntime" and kind == "conv" else []
    for step in (QuantizeWeights(graph.plan), QuantizeInputs(graph.plan, unsigned=True), *outputs):
        step(graph.model)
    path = tmp_path / "graph.onnx"
    onnx.save(ir.to_proto(graph.model), path)
    x = np.full((2, *list(graph.x.shape)[1:]), 1000, np.float32)  # beyond the grid: its last code, 255
    found = next(iter(run_graph(backend, path, {"x": x, "timestep": np.array([0, 1])}).values()))
    (plan,) = graph.plans
    products = CHANNELS * (9 if kind == "conv" else 1)
    expected = products * 127 * 127 * plan.scale * plan.weight_scales
    expected = expected.reshape((-1, 1, 1)) if kind == "conv" else expected
    # Half a step of the result's grid, or what float32 rounds.
    allowed = 1251 if outputs else expected * 1e-5
    assert (np.abs(found - expected) <= allowed).all()
