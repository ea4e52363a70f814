"""Small ONNX graphs in the form of the TensorRT target: float16, Q/DQ around INT8 convolutions, a dynamic batch."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from qdm_deploy.engines.cache import EngineCache

CHANNELS, SIZE = 32, 16


class Graph:
    """Collects nodes and initializers; every node is called ``<its output>/node``."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def constant(self, name: str, value: NDArray[np.generic]) -> str:
        self.initializers.append(numpy_helper.from_array(value, name))
        return name

    def node(self, operator: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(operator, inputs, [output], name=f"{output}/node", **attributes))
        return output

    def dequantized(self, tensor: str, *, zero_point: int = 0, scale: float = 0.02, runtime_scale: str = "") -> str:
        grid = runtime_scale or self.constant(f"{tensor}.scale", np.array(scale, np.float16))
        zero = self.constant(f"{tensor}.zero", np.array(zero_point, np.int8))
        codes = self.node("QuantizeLinear", [tensor, grid, zero], f"{tensor}.q")
        return self.node("DequantizeLinear", [codes, grid, zero], f"{tensor}.dq")

    def int8_weight(self, name: str, shape: tuple[int, ...], axis: int = 0) -> str:
        codes = np.random.default_rng(0).integers(-127, 128, shape).astype(np.int8)
        scale = self.constant(f"{name}.scale", np.full(shape[axis], 1e-3, np.float16))
        return self.node("DequantizeLinear", [self.constant(name, codes), scale], f"{name}.dq", axis=axis)

    def save(self, path: Path, *, batch: int | str = "B", shape: Sequence[int | str] = (CHANNELS, SIZE, SIZE)) -> Path:
        """Input "x", output "y", both float16."""
        value = [helper.make_tensor_value_info("x", TensorProto.FLOAT16, [batch, *shape])]
        if any("t" in node.input for node in self.nodes):
            value.append(helper.make_tensor_value_info("t", TensorProto.INT64, []))
        result = [helper.make_tensor_value_info("y", TensorProto.FLOAT16, None)]
        graph = helper.make_graph(self.nodes, "g", value, result, self.initializers)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("acme", 1)]
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
        return path


@pytest.fixture
def new_graph() -> type[Graph]:
    return Graph


@pytest.fixture
def blocks(tmp_path: Path) -> Callable[..., Path]:
    """Blocks of norm, SiLU, shift, quantize, convolution and constant map, one per entry: "int8" or "float16"."""

    def build(*forms: str, name: str = "blocks.onnx") -> Path:
        graph, x = Graph(), "x"
        shape = (CHANNELS, CHANNELS, 3, 3)
        for index, form in enumerate(forms):
            block = f"block{index}"
            ones = graph.constant(f"{block}.gamma", np.ones(CHANNELS, np.float16))
            zeros = graph.constant(f"{block}.beta", np.zeros(CHANNELS, np.float16))
            x = graph.node("GroupNormalization", [x, ones, zeros], f"{block}.norm", num_groups=8)
            x = graph.node("Mul", [x, graph.node("Sigmoid", [x], f"{block}.sigmoid")], f"{block}.silu")
            if form == "float16":
                weight = graph.constant(f"{block}.weight", np.ones(shape, np.float16))
            else:
                x = graph.node("Sub", [x, graph.constant(f"{block}.z", np.array(0.5, np.float16))], f"{block}.u")
                x, weight = graph.dequantized(x), graph.int8_weight(f"{block}.weight", shape)
            x = graph.node("Conv", [x, weight], f"{block}.conv", pads=[1] * 4)
            offset = graph.constant(f"{block}.map", np.ones((1, CHANNELS, SIZE, SIZE), np.float16))
            x = graph.node("Add", [x, offset], "y" if index == len(forms) - 1 else f"{block}.out")
        return graph.save(tmp_path / name)

    return build


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path / "cache")


@pytest.fixture
def rtx() -> None:
    pytest.importorskip("tensorrt_rtx", reason="builds real engines: needs the extra 'tensorrt-rtx'")
