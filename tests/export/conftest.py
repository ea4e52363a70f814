"""The targets' graphs of the tiny models on disk, each written once, and small graphs for single passes."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray

from qdm_deploy.artifacts.plan import LayerPlan, QuantizationPlan, Target
from qdm_deploy.artifacts.topology import Layer
from qdm_deploy.backends.onnxruntime.session import session_options
from qdm_export.float_graph import example_inputs
from qdm_export.targets import Rest, emit
from qdm_export.topology import MODULE_KEY

Array = NDArray[Any]
Feeds = dict[str, Array]


def session(
    model: ir.Model | Path, *, optimized: Path | None = None, optimize: bool = True
) -> onnxruntime.InferenceSession:
    options = session_options()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if optimized is not None:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(optimized)
    source = str(model) if isinstance(model, Path) else ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def run(model: ir.Model | Path, feeds: Mapping[str, Array], *, optimize: bool = True) -> dict[str, Array]:
    """Every output of the graph by name; inputs it does not have are left out."""
    opened = session(model, optimize=optimize)
    names = [item.name for item in opened.get_outputs()]
    given = {item.name: feeds[item.name] for item in opened.get_inputs()}
    return dict(zip(names, opened.run(names, given), strict=True))


class Emitted:
    """Target graphs of the tiny models, in memory."""

    def __init__(self, tiny: Any) -> None:
        self.tiny = tiny
        self.made: dict[tuple[str, Target, Rest], ir.Model] = {}

    def graph(self, name: str, target: Target, rest: Rest = "fp16") -> ir.Model:
        if (name, target, rest) not in self.made:
            self.made[name, target, rest] = emit(
                self.tiny.float_graph(name), self.tiny.plan(name), target, rest=rest
            ).model
        return self.made[name, target, rest]

    def feeds(self, name: str, batch: int, seed: int = 1) -> Feeds:
        """Fresh random inputs, rows at different timesteps, by input name."""
        checkpoint = self.tiny.checkpoint(name)
        values = example_inputs(checkpoint, batch, seed)
        return {spec.name: value.numpy() for spec, value in zip(checkpoint.denoiser.interface, values, strict=True)}


@pytest.fixture(scope="session")
def emitted(tiny: Any) -> Emitted:
    return Emitted(tiny)


@pytest.fixture(scope="session")
def run_graph() -> Callable[..., dict[str, Array]]:
    return run


@pytest.fixture(scope="session")
def open_session() -> Callable[..., onnxruntime.InferenceSession]:
    return session


class SmallGraph:
    """A graph of one or two layers that read "x", as the exporter would write it, with the plan for them."""

    def __init__(self, shape: Sequence[int], *, opset: int = 21) -> None:
        dims = ["batch", *shape]
        self.x = ir.Value(name="x", shape=ir.Shape(dims), type=ir.TensorType(ir.DataType.FLOAT))
        self.t = ir.Value(name="timestep", shape=ir.Shape(["batch"]), type=ir.TensorType(ir.DataType.INT64))
        self.graph = ir.Graph([self.x, self.t], [], nodes=[], opset_imports={"": opset}, name="small")
        self.model = ir.Model(self.graph, ir_version=10)
        self.plans: list[LayerPlan] = []
        self.weights: dict[str, Array] = {}
        self.biases: dict[str, Array | None] = {}

    def constant(self, name: str, values: Array) -> ir.Value:
        tensor = ir.tensor(values, name=name)
        value = ir.Value(name=name, shape=ir.Shape(values.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def node(
        self, op: str, inputs: Sequence[ir.Value | None], shape: Sequence[Any], *, module: str = "", **attributes: Any
    ) -> ir.Value:
        name = f"n{len(self.graph)}"
        out = ir.Value(name=f"{name}_out", shape=ir.Shape(["batch", *shape]), type=ir.TensorType(ir.DataType.FLOAT))
        props = {MODULE_KEY: f"net.unet.{module}"} if module else {}
        self.graph.append(ir.node(op, inputs, attributes, outputs=[out], name=name, metadata_props=props))
        return out

    def output(self, value: ir.Value) -> None:
        """Return ``value`` behind an Identity: no INT8 layer is the last node of a step graph."""
        assert value.shape is not None
        self.graph.outputs.append(self.node("Identity", [value], list(value.shape)[1:]))

    def plan_of(self, layer: Layer, codes: Array, bias: Array | None, changes: dict[str, Any]) -> None:
        scale = np.linspace(0.25, 0.5, len(codes)).astype(np.float16).astype(np.float32)
        weight = codes * scale.reshape(-1, *([1] * (codes.ndim - 1)))
        if changes.get("inverse_k") is not None:  # codes are of W * k
            weight = weight * changes["inverse_k"].reshape(1, -1, *([1] * (codes.ndim - 2)))
        self.weights[layer.name], self.biases[layer.name] = weight.astype(np.float32), bias
        values = {
            "scale": 0.125,
            "weight_codes": codes.astype(np.int8),
            "weight_scale": scale,
            "output_scale": np.linspace(0.3, 0.7, len(codes)).astype(np.float32),
            "output_zero_point": np.linspace(70, 150, len(codes)).astype(np.uint8),
        }
        self.plans.append(LayerPlan(layer, "int8", **{**values, **changes}))

    def conv(
        self, name: str = "conv", *, out: int = 3, kernel: int = 3, stride: int = 1, pad: int = 1, bias: bool = True,
        seed: int = 0, group: str | None = None, source: ir.Value | None = None, normalized: bool = False,
        **changes: Any,
    ) -> ir.Value:  # fmt: skip
        rng = np.random.default_rng(seed)
        data = self.x if source is None else source
        assert data.shape is not None
        channels, height, width = (int(size) for size in list(data.shape)[1:])
        pads = (pad, pad, pad, pad)
        layer = Layer(
            name,
            "conv",
            (out, channels, kernel, kernel),
            group or name,
            (channels,),
            normalized,
            (stride, stride),
            pads,
            (height, width),
        )
        b = rng.normal(size=out).astype(np.float32) if bias else None
        self.plan_of(layer, rng.integers(-127, 128, (out, channels, kernel, kernel)), b, changes)
        inputs = [data, self.constant(f"{name}.weight", self.weights[name])] + (
            [self.constant(f"{name}.bias", b)] if b is not None else []
        )
        size = [(n + 2 * pad - kernel) // stride + 1 for n in (height, width)]
        attributes = {
            "strides": [stride] * 2,
            "pads": list(pads),
            "kernel_shape": [kernel] * 2,
            "dilations": [1, 1],
            "group": 1,
        }
        return self.node("Conv", inputs, [out, *size], module=name, **attributes)

    def linear(
        self, name: str = "linear", *, out: int = 3, kind: str = "Gemm", bias: bool = True, seed: int = 0,
        group: str | None = None, **changes: Any,
    ) -> ir.Value:  # fmt: skip
        rng = np.random.default_rng(seed)
        assert self.x.shape is not None
        middle = list(self.x.shape)[1:-1]
        channels = int(list(self.x.shape)[-1])
        layer = Layer(name, "linear", (out, channels), group or name, (channels,), False)
        b = rng.normal(size=out).astype(np.float32) if bias else None
        changes = {"output_scale": None, "output_zero_point": None, **changes}
        self.plan_of(layer, rng.integers(-127, 128, (out, channels)), b, changes)
        weight = self.weights[name]
        if kind == "Gemm":
            inputs = [self.x, self.constant(f"{name}.weight", weight)] + (
                [self.constant(f"{name}.bias", b)] if b is not None else []
            )
            return self.node("Gemm", inputs, [*middle, out], module=name, transB=1)
        product = self.node(
            "MatMul", [self.x, self.constant(f"{name}.weight", weight.T.copy())], [*middle, out], module=name
        )
        return (
            product
            if b is None
            else self.node("Add", [self.constant(f"{name}.bias", b), product], [*middle, out], module=name)
        )

    @property
    def plan(self) -> QuantizationPlan:
        return QuantizationPlan(tuple(self.plans), np.array([0, 400, 1000]))


@pytest.fixture
def small() -> type[SmallGraph]:
    return SmallGraph
