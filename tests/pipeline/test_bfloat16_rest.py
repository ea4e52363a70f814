"""``rest="bf16"``: the tensorrt graph alone is bfloat16, and the build checks it as that."""

from pathlib import Path
from typing import Any

import onnx

from qdm_deploy.artifacts.bundle import Bundle

BFLOAT16, FLOAT16 = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT16


def types_in(path: Path) -> set[int]:
    graph = onnx.load(str(path), load_external_data=False).graph
    return {tensor.data_type for tensor in graph.initializer}


def test_a_build_with_a_bfloat16_rest(quick_build: Any, tmp_path: Path) -> None:
    built = quick_build(tmp_path / "bf16.qdm", rest="bf16")
    graphs = {
        name: types_in(built.bundle / "unet" / f"{name}.onnx") for name in ("onnxruntime", "openvino", "tensorrt")
    }
    assert BFLOAT16 in graphs["tensorrt"]
    assert FLOAT16 not in graphs["tensorrt"]
    assert not {BFLOAT16, FLOAT16} & (graphs["onnxruntime"] | graphs["openvino"])
    manifest = Bundle.open(built.bundle).manifest
    assert manifest.compatibility.opset == 22
    assert manifest.recipe["rest"] == "bf16"
    (row,) = [row for row in built.report.checks if "bfloat16" in row.name]
    assert row.ok, row


def test_the_default_is_float16(labels_build: Any) -> None:
    types = types_in(labels_build.bundle / "unet" / "tensorrt.onnx")
    assert FLOAT16 in types
    assert BFLOAT16 not in types
    assert Bundle.open(labels_build.bundle).manifest.compatibility.opset == 21
