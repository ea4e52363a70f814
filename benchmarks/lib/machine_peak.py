"""What this machine could do at best, by one large matrix product, and how many multiply-accumulates a model takes."""

import time
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from lib.bench import Case
from numpy.typing import NDArray

__all__ = ["float_peak", "integer_peak", "multiply_accumulates"]

# Large enough to be bound by arithmetic, small enough to stay in the caches.
_SIZE = 1536
# The best of seconds, not of a moment: on a shared host one in a few is undisturbed.
_RUNS = 100


def integer_peak() -> float:
    """Multiply-accumulates a second of a u8 by s8 product with 32-bit sums, all cores."""
    matrix = np.random.default_rng(0)
    left = matrix.integers(0, 255, (_SIZE, _SIZE), dtype=np.uint8)
    # A constant, as weights are: the runtime packs it once.
    right = ir.tensor(matrix.integers(-128, 127, (_SIZE, _SIZE), dtype=np.int8), name="right")
    return _peak("MatMulInteger", ir.DataType.UINT8, right, ir.DataType.INT32, left)


def float_peak() -> float:
    """Multiply-accumulates a second of a float32 product, all cores."""
    matrix = np.random.default_rng(0)
    left = matrix.standard_normal((_SIZE, _SIZE), dtype=np.float32)
    right = ir.tensor(matrix.standard_normal((_SIZE, _SIZE), dtype=np.float32), name="right")
    return _peak("MatMul", ir.DataType.FLOAT, right, ir.DataType.FLOAT, left)


def _peak(operator: str, kind: ir.DataType, right: ir.TensorProtocol, result: ir.DataType, left: NDArray[Any]) -> float:
    value = ir.Value(name="left", type=ir.TensorType(kind), shape=ir.Shape([_SIZE, _SIZE]))
    weight = ir.Value(name="right", type=ir.TensorType(right.dtype), shape=right.shape, const_value=right)
    node = ir.node(operator, [value, weight])
    node.outputs[0].name = "out"
    node.outputs[0].type, node.outputs[0].shape = ir.TensorType(result), ir.Shape([_SIZE, _SIZE])
    graph = ir.Graph([value], node.outputs, nodes=[node], initializers=[weight], opset_imports={"": 21}, name="peak")
    model = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    times = []
    for _ in range(_RUNS):
        start = time.perf_counter()
        session.run(None, {"left": left})
        times.append(time.perf_counter() - start)
    return _SIZE**3 / min(times)


def multiply_accumulates(model: Case) -> int:
    """Of all convolutions and linear layers of the U-Net, for one row; attention's own products are not counted."""
    spec, unet = model.checkpoint.spec, model.checkpoint.unet
    total = 0

    def count(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal total
        weight = module.get_parameter("weight")
        total += weight.numel() * (output.numel() // (len(output) * len(weight)))

    layers = [module for module in unet.modules() if isinstance(module, torch.nn.Conv2d | torch.nn.Linear)]
    handles = [layer.register_forward_hook(count) for layer in layers]
    calibration = model.calibration
    inputs = {name: torch.from_numpy(values[:1]) for name, values in calibration.conditioning.items()}
    with torch.inference_mode():
        unet(torch.zeros(1, *spec.sample_shape), torch.from_numpy(calibration.timestep[:1]), **inputs)
    for handle in handles:
        handle.remove()
    return total
