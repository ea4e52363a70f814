"""Checks of the emitted graphs against PyTorch, before anybody trusts them.

A quantized network is chaotic: one activation that rounds the other way changes every code behind it, and two correct
implementations of the same integers (the float32 and the float64 simulation, say) end up as far from each other as each
is from the float model. So integers are compared layer by layer, each on the input its own layer really got.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.artifacts.phase_sums import PHASES, fits_phases, upsampled
from qdm_deploy.artifacts.plan import LayerPlan, QuantizationPlan, Target
from qdm_deploy.backends.onnxruntime.session import session_options
from qdm_deploy.backends.openvino.graph import compile_graph, import_openvino
from qdm_deploy.metrics.error import max_abs_difference, sqnr_db, sqnr_per_step_db
from qdm_deploy.report.model import CheckRow

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

    from qdm_export.unet import Checkpoint

__all__ = [
    "check_bfloat16_graph",
    "check_float_graph",
    "check_half_graph",
    "check_integer_kernels",
    "check_layers",
    "run_graph",
]

Arrays = Mapping[str, NDArray[Any]]
# What a correct float32 graph reaches; a wrong operator or weight does not come near it.
_FLOAT_SQNR_DB = 90.0
# How far below the quantization error itself an implementation error must be.
_MARGIN_DB = 15.0
# Float16 adds about -66 dB of rounding per operation, and two runs of one plan differ by chaos; a wrong type or a lost
# scale costs far more.
_HALF_DB = 2.0
# Bfloat16 also rounds the plan's scales and offsets, by up to 0.2 %.
_BFLOAT16_DB = 4.0


def check_float_graph(outputs: Arrays, checkpoint: "Checkpoint", inputs: Arrays) -> CheckRow:
    """The float step graph's outputs against PyTorch on the same inputs."""
    import torch

    from qdm_export.step_graph import StepGraph

    step = StepGraph(checkpoint.unet, checkpoint.denoiser).eval()
    interface = step.interface
    with torch.inference_mode():
        expected = [
            value.numpy() for value in step(*(torch.from_numpy(inputs[name]) for name in interface.input_names))
        ]
    pairs = [(reference, outputs[name]) for name, reference in zip(interface.output_names, expected, strict=True)]
    sqnr = min(sqnr_db(reference, value) for reference, value in pairs)
    largest = max(max_abs_difference(reference, value) for reference, value in pairs)
    detail = f"{sqnr:.0f} dB, at most {largest:.1e} apart (needed: {_FLOAT_SQNR_DB:.0f} dB)"
    return CheckRow(name="float graph computes what PyTorch does", ok=sqnr >= _FLOAT_SQNR_DB, detail=detail)


def check_integer_kernels(plan: QuantizationPlan, optimized: Path) -> CheckRow:
    """Every planned layer is an integer kernel in the graph that ONNX Runtime really runs."""
    from qdm_export.check import integer_kernels

    found = integer_kernels(optimized)
    planned = Counter("conv" if item.layer.kind == "conv" else "linear" for item in plan.quantized)
    planned["conv"] += (len(PHASES) - 1) * sum(fits_phases(item) for item in plan.quantized)
    convs, linears = found["QLinearConv"], sum(found.values()) - found["QLinearConv"]
    ok = convs == planned["conv"] and linears == planned["linear"]
    detail = f"{convs} of {planned['conv']} convolutions and {linears} of {planned['linear']} matrix products"
    return CheckRow(name="ONNX Runtime runs integer kernels where planned", ok=ok, detail=detail)


def check_layers(
    checkpoint: "Checkpoint",
    plan: QuantizationPlan,
    target: Target,
    float_graph: "ir.Model",
    inputs: Arrays,
    folder: Path,
) -> CheckRow:
    """Every INT8 layer of a target's graph against its simulation, on the input that layer got in that graph.

    Where factors k are absorbed, the float graph with them is first held against PyTorch.
    The graph is emitted once more, with each layer's input and result among its outputs, and in float32 throughout: a
    float16 engine rounds an input before it returns it, and what was rounded is not what was quantized.
    """
    import torch

    from qdm_calibration.simulate import quantized_layer
    from qdm_export.check import layer_endpoints, with_outputs
    from qdm_export.float_graph import save_graph
    from qdm_export.targets import absorb, emit

    name = f"{target} graph computes the planned integers"
    backend = "onnxruntime" if target == "onnxruntime" else "openvino"
    rewritten = float_graph.clone()
    absorbed = absorb(rewritten, plan, target)
    if absorbed.inputs:
        # A layer is checked on the input it gets, so a factor lost on the way there would not show: this does.
        path = folder / f"{target}.absorbed.onnx"
        save_graph(rewritten, path, weights=f"{target}.absorbed.data")
        same = check_float_graph(run_graph(backend, path, inputs), checkpoint, inputs)
        if not same.ok:
            return CheckRow(name=name, ok=False, detail=f"with its factors k absorbed, the float graph: {same.detail}")
    graph = emit(float_graph, plan, target, rest="fp32").model
    endpoints = layer_endpoints(graph, plan)
    path = folder / f"{target}.check.onnx"
    exposed = with_outputs(graph, [name for item in endpoints for name in (item.data, item.result)])
    save_graph(exposed, path, weights=f"{target}.check.data")
    values = run_graph(backend, path, inputs)
    bins = torch.from_numpy(plan.bin_of_timestep()[inputs["timestep"].astype(np.int64)])

    def along(layer: LayerPlan, factor: NDArray[np.float32]) -> torch.Tensor:
        return torch.from_numpy(factor).reshape((-1, 1, 1) if layer.layer.kind == "conv" else (-1,))

    margins: dict[str, float] = {}
    for item in endpoints:
        module = checkpoint.unet.unet.get_submodule(item.name)
        layer_plan = plan.layer(item.name)
        data = _padded(torch.from_numpy(upsampled(values[item.data], layer_plan.layer)), layer_plan, module)
        whole = data
        if item.name in absorbed.inputs:  # the graph's tensor is x / k already
            layer_plan = replace(layer_plan, inverse_k=None)
            whole = data / along(layer_plan, absorbed.inputs[item.name])
        factor = absorbed.outputs.get(item.name)  # and this layer returns x / k of a later one
        layer = quantized_layer(module, layer_plan, target)
        layer.time_bin = bins
        with torch.inference_mode():
            exact, simulated = module(whole), layer(data)
            if factor is not None:
                exact, simulated = exact * along(layer_plan, factor), simulated * along(layer_plan, factor)
            exact, simulated = exact.numpy(), simulated.numpy()
        margins[item.name] = sqnr_db(simulated, values[item.result]) - sqnr_db(exact, simulated)
    if not margins:
        return CheckRow(name=name, ok=True, detail="no layer is planned in INT8")
    worst = min(margins, key=lambda name: margins[name])
    matching = sum(margin >= _MARGIN_DB for margin in margins.values())
    detail = (
        f"{matching} of {len(margins)} layers match their simulation; the implementation's error is at least "
        f"{margins[worst]:.0f} dB below the layer's quantization error (needed: {_MARGIN_DB:.0f} dB; least at {worst})"
    )
    return CheckRow(name=name, ok=matching == len(margins), detail=detail)


def _padded(data: "torch.Tensor", layer: LayerPlan, module: "torch.nn.Module") -> "torch.Tensor":
    """The input that ``module`` gets: where the network pads before a convolution, the graph's Conv does so itself."""
    import torch

    if not isinstance(module, torch.nn.Conv2d) or isinstance(module.padding, str):
        return data
    top, left, bottom, right = layer.layer.pads
    height, width = module.padding
    before = (left - width, right - width, top - height, bottom - height)
    return torch.nn.functional.pad(data, before) if any(before) else data


def check_half_graph(
    path: Path, expected: NDArray[np.float32], simulated: NDArray[np.float32], inputs: Arrays
) -> CheckRow:
    """The float16 graph that ships, run on OpenVINO: as close to the float model as the float32 simulation of its plan.

    Args:
        path: the ``tensorrt`` graph.
        expected: x0 of the float model for ``inputs``, which make it the network's output.
        simulated: x0 of the simulation.
        inputs: step graph inputs.
    """
    got = run_graph("openvino", path, inputs)["x0"]
    wanted = fmean(sqnr_per_step_db(expected, simulated))
    return _half_row("float16", expected, got, wanted - _HALF_DB, f"its simulation {wanted:.1f} dB")


def check_bfloat16_graph(
    path: Path,
    float_path: Path,
    expected: NDArray[np.float32],
    simulated: NDArray[np.float32],
    inputs: Arrays,
    folder: Path,
) -> CheckRow:
    """The bfloat16 graph that ships, in bfloat16 on OpenVINO: as close to the float model as its two errors together.

    They are that of the plan, and that of the float model in bfloat16. OpenVINO 2026.4 compiles no bfloat16 graph with
    Q/DQ, so it gets the same constants in float32 and is told to compute in bfloat16; a CPU without bfloat16 computes
    in float32, and then only the constants are checked.

    Args:
        path: the ``tensorrt`` graph.
        float_path: the float graph.
        expected: x0 of the float model for ``inputs``, which make it the network's output.
        simulated: x0 of the simulation.
        inputs: step graph inputs.
        folder: for a graph that is run once.
    """
    from qdm_export.check import widened
    from qdm_export.float_graph import save_graph

    copy = folder / "tensorrt.widened.onnx"
    save_graph(widened(path), copy, weights="tensorrt.widened.data")
    got = run_graph("openvino", copy, inputs, precision="bf16")["x0"]
    rounded = run_graph("openvino", float_path, inputs, precision="bf16")["x0"]
    plan_db, rest_db = sqnr_per_step_db(expected, simulated), sqnr_per_step_db(expected, rounded)
    # Noise powers add.
    both = [-10 * math.log10(10 ** (-a / 10) + 10 ** (-b / 10)) for a, b in zip(plan_db, rest_db, strict=True)]
    detail = f"its simulation {fmean(plan_db):.1f} dB and bfloat16 without INT8 {fmean(rest_db):.1f} dB"
    return _half_row("bfloat16", expected, got, fmean(both) - _BFLOAT16_DB, detail)


def _half_row(
    half: str, expected: NDArray[np.float32], got: NDArray[np.float32], needed: float, beside: str
) -> CheckRow:
    # Row by row: the last step's error would drown the others' in one sum.
    reached = fmean(sqnr_per_step_db(expected, got))
    detail = f"{reached:.1f} dB from the float model, {beside} (needed: {needed:.1f} dB)"
    return CheckRow(name=f"tensorrt graph in {half} is as good as its plan", ok=reached >= needed, detail=detail)


def run_graph(
    backend: str, path: Path, inputs: Arrays, *, optimized: Path | None = None, precision: str = "f32"
) -> dict[str, NDArray[Any]]:
    """All outputs of a graph on a CPU backend.

    Args:
        backend: "onnxruntime" or "openvino".
        path: the graph.
        inputs: its inputs; others are left out.
        optimized: where to keep the graph that ONNX Runtime makes of it.
        precision: "f32", or "bf16" to let OpenVINO compute in bfloat16.
    """
    if backend == "openvino":
        openvino = import_openvino()
        core = openvino.Core()
        graph = core.read_model(str(path))
        given = {item.any_name: inputs[item.any_name] for item in graph.inputs}
        # As a session does. With shapes left open and no low-precision transformations, which is how a CPU without
        # VNNI runs it, OpenVINO 2026.4 loses factors per channel in front of a quantize.
        graph.reshape({name: list(values.shape) for name, values in given.items()})
        model = compile_graph(core, graph, {"INFERENCE_PRECISION_HINT": precision})
        results = model(given)
        # A value may be several outputs' tensor, and has then several names.
        return {name: results[port] for port in model.outputs for name in port.get_names()}
    import onnxruntime

    options = session_options()
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_outputs()]
    wanted = {item.name for item in session.get_inputs()}
    return dict(
        zip(names, session.run(names, {key: value for key, value in inputs.items() if key in wanted}), strict=True)
    )
