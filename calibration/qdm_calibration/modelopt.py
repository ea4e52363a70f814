"""Scales that NVIDIA's TensorRT Model Optimizer chose, as a plan of ours.

Its INT8 form is symmetric: one scale amax / 127 per input tensor, one per output channel of a weight, rounded to
float16 here as every scale of a plan. SmoothQuant's ``pre_quant_scale`` (Xiao et al. 2023, equation 3) multiplies the
input per channel and divides the weight's columns, which is what 1 / k of a plan does. There is no z and no r.

The quantizers come from running ModelOpt (``modelopt_network``), or from the state of a network that it quantized
elsewhere (``read_quantizer_state``).
"""

import copy
import io
import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import nn

from qdm_calibration.layers import layer_of, unet_of
from qdm_calibration.plan import PlanOptions, output_grid
from qdm_calibration.ranges import float16_exact, quantize_weight, weight_sqnr_db
from qdm_calibration.rows import in_batches, run_rows
from qdm_deploy.artifacts.calibration_set import CalibrationSet
from qdm_deploy.artifacts.plan import LayerPlan, QuantizationPlan
from qdm_deploy.artifacts.statistics import ActivationStatistics
from qdm_deploy.artifacts.topology import Layer, Topology
from qdm_deploy.errors import EnvironmentProblem, InputError
from qdm_deploy.progress import SILENT, Progress

__all__ = [
    "CONFIGS",
    "Quantizer",
    "modelopt_network",
    "plan_from_modelopt",
    "plan_from_quantizers",
    "quantizers_of",
    "read_quantizer_state",
    "require_modelopt",
]

CONFIGS = ("INT8_DEFAULT_CFG", "INT8_SMOOTHQUANT_CFG", "INT8_DIFFUSERS")
# What NVIDIA's example for diffusers keeps in floating point; INT8_DIFFUSERS is INT8_DEFAULT_CFG with this filter.
_DIFFUSERS_FILTER = re.compile(r".*(time_emb_proj|time_embedding|conv_in|conv_out|conv_shortcut|add_embedding).*")
_INPUT, _WEIGHT = "input_quantizer", "weight_quantizer"
_KEY = re.compile(rf"(?P<layer>.+)\.(?P<which>{_INPUT}|{_WEIGHT})\.(?P<what>_amax|_pre_quant_scale)")
_QMAX = 127


@dataclass(frozen=True)
class Quantizer:
    """What ModelOpt measured for one layer.

    Attributes:
        input_amax: largest magnitude of the input after ``pre_quant_scale``.
        weight_amax: largest magnitude of the weight after division by ``pre_quant_scale``, [O] or [1] float32.
        pre_quant_scale: SmoothQuant's factor per input channel, [C] float32; None without SmoothQuant.
    """

    input_amax: float
    weight_amax: NDArray[np.float32]
    pre_quant_scale: NDArray[np.float32] | None = None


def require_modelopt() -> None:
    """Refuse early where ModelOpt is missing.

    Raises:
        EnvironmentProblem: it is.
    """
    if find_spec("modelopt") is None:
        raise EnvironmentProblem(
            "scales from ModelOpt need the module modelopt, which this environment lacks; install it with "
            "pip install 'qdm-deploy[modelopt]', or give a file of quantizer state"
        )


def modelopt_network(
    network: nn.Module,
    calibration: CalibrationSet,
    config_name: str,
    *,
    batch_size: int = 16,
    progress: Progress = SILENT,
) -> nn.Module:
    """A copy of ``network`` with ModelOpt's own quantizers, calibrated: it computes as ModelOpt itself would.

    Args:
        network: takes (sample, timestep, **conditioning); stays as it is.
        calibration: network inputs, all of which are run.
        config_name: one of ``CONFIGS``.
        batch_size: rows per forward pass.
        progress: where to report.

    Raises:
        InputError: an unknown configuration.
        EnvironmentProblem: ModelOpt is missing.
    """
    if config_name not in CONFIGS:
        raise InputError(f"ModelOpt configuration {config_name!r} is not known; choose one of {', '.join(CONFIGS)}")
    require_modelopt()

    def run(model: nn.Module) -> None:
        with progress.task("ModelOpt: calibrating", len(calibration)) as advance, torch.no_grad():
            for rows in in_batches(np.arange(len(calibration)), batch_size):
                run_rows(model, calibration, rows)
                advance(len(rows))

    # ModelOpt prints counts, and warns of optional packages for language models: neither is about the user's model,
    # and standard output belongs to our results.
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        import modelopt.torch.quantization as mtq

        base = "INT8_DEFAULT_CFG" if config_name == "INT8_DIFFUSERS" else config_name
        twin: nn.Module = mtq.quantize(copy.deepcopy(network), copy.deepcopy(getattr(mtq, base)), run)
        if config_name == "INT8_DIFFUSERS":
            mtq.disable_quantizer(twin, lambda name: _DIFFUSERS_FILTER.match(name) is not None)
    return twin.eval()


def quantizers_of(network: nn.Module) -> dict[str, Quantizer]:
    """The layers of a network of ``modelopt_network`` whose input and weight are both quantized, by layer name."""
    found = {}
    for name, module in unet_of(network).named_modules():
        source, weight = getattr(module, _INPUT, None), getattr(module, _WEIGHT, None)
        if source is None or weight is None or not (source.is_enabled and weight.is_enabled):
            continue
        factor = source.pre_quant_scale
        found[name] = Quantizer(
            float(source.amax),
            weight.amax.detach().float().numpy().reshape(-1),
            None if factor is None else factor.detach().float().numpy().reshape(-1),
        )
    return found


def read_quantizer_state(path: Path) -> dict[str, Quantizer]:
    """Quantizers from the ``state_dict`` of a U-Net that ModelOpt quantized, saved with safetensors.

    Read are ``<layer>.input_quantizer._amax``, ``<layer>.weight_quantizer._amax`` and, of SmoothQuant,
    ``<layer>.input_quantizer._pre_quant_scale``; other tensors are ignored. The state does not tell bits, nor that a
    quantizer was disabled after it had been calibrated: leave such a layer's keys out.

    Raises:
        InputError: the file cannot be read, holds no quantizers, or a range that means nothing.
    """
    if not path.is_file():
        raise InputError(
            f"there is no file {path}, and no ModelOpt configuration of that name; give a safetensors file, or one of "
            f"{', '.join(CONFIGS)}"
        )
    values: dict[str, dict[str, NDArray[np.float32]]] = {}
    try:
        with safe_open(path, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - a safetensors handle is not iterable
                if (match := _KEY.fullmatch(key)) is not None:
                    value = tensors.get_tensor(key).float().numpy().reshape(-1)
                    _refuse_nonsense(path, key, value)
                    values.setdefault(match["layer"], {})[match["which"] + match["what"]] = value
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read as safetensors ({error}); save the state with safetensors") from error
    found = {
        layer: Quantizer(
            float(parts[_INPUT + "_amax"][0]), parts[_WEIGHT + "_amax"], parts.get(f"{_INPUT}_pre_quant_scale")
        )
        for layer, parts in values.items()
        if _INPUT + "_amax" in parts and _WEIGHT + "_amax" in parts
    }
    if not found:
        raise InputError(
            f"{path} holds no layer with both <layer>.input_quantizer._amax and <layer>.weight_quantizer._amax; give "
            "the state of a network that ModelOpt quantized"
        )
    return found


def plan_from_modelopt(
    network: nn.Module,
    topology: Topology,
    calibration: CalibrationSet,
    config_name: str,
    statistics: ActivationStatistics,
    *,
    provenance: Mapping[str, Any] | None = None,
    progress: Progress = SILENT,
) -> QuantizationPlan:
    """Run ModelOpt's calibration with one of ``CONFIGS`` and plan what it chose; see ``plan_from_quantizers``.

    Raises:
        InputError: an unknown configuration.
        EnvironmentProblem: ModelOpt is missing.
    """
    twin = modelopt_network(network, calibration, config_name, progress=progress)
    return plan_from_quantizers(
        network,
        topology,
        quantizers_of(twin),
        statistics,
        source=config_name,
        provenance=provenance,
    )


def plan_from_quantizers(
    network: nn.Module,
    topology: Topology,
    quantizers: Mapping[str, Quantizer],
    statistics: ActivationStatistics,
    *,
    source: str,
    provenance: Mapping[str, Any] | None = None,
) -> QuantizationPlan:
    """A plan with ModelOpt's scales where both it and the topology quantize.

    Args:
        network: holds the float weights.
        topology: the layers in execution order.
        quantizers: ModelOpt's, by layer name.
        statistics: of the same calibration; the ranges of outputs, which ModelOpt does not quantize and the target
            onnxruntime does, and of the channels of inputs whose readers were smoothed differently.
        source: configuration or file, for the record.
        provenance: what to remember.

    Raises:
        InputError: the quantizers are of another network.
    """
    plans: dict[str, LayerPlan] = {}
    for group, layers in topology.groups().items():
        quantized = [layer for layer in layers if layer.name in quantizers]
        for layer in layers:
            if layer.name not in quantizers:
                plans[layer.name] = LayerPlan(layer, "float", reason=f"ModelOpt ({source}) does not quantize it")
        if not quantized:
            continue
        for layer in quantized:
            _refuse_misfit(layer, quantizers[layer.name], source)
        grid = _shared_grid(
            quantized, quantizers, statistics.inputs[group].channel_min, statistics.inputs[group].channel_max, source
        )
        for layer in quantized:
            weight = layer_of(network, layer.name).get_parameter("weight").detach().numpy()
            plans[layer.name] = _plan_layer(layer, weight, quantizers[layer.name], grid, statistics)
    if not plans or all(plan.precision == "float" for plan in plans.values()):
        raise InputError(
            f"{source} quantizes no layer that this network can run in INT8; its layers are called like "
            f"{next(iter(quantizers), 'none')!r}, the network's like {topology.layers[0].name!r}"
        )
    for layer in topology:
        if layer.float_reason is not None:
            plans[layer.name] = LayerPlan(layer, "float", reason=layer.float_reason)
    kept = sorted(name for name in quantizers if name not in plans or plans[name].precision == "float")
    return QuantizationPlan(
        layers=tuple(plans[layer.name] for layer in topology),
        timestep_edges=statistics.timestep_edges[[0, -1]],
        options={"from_modelopt": source},
        provenance={
            **(provenance or {}),
            "statistics": dict(statistics.provenance),
            "modelopt": {"source": source, "quantized_there_but_float_here": kept},
        },
    )


@dataclass(frozen=True)
class _Grid:
    """The grid of one shared input; ``agreed`` is false where its readers' SmoothQuant factors had to be merged."""

    scale: float
    inverse_k: NDArray[np.float32] | None
    agreed: bool
    notes: Mapping[str, str]


def _shared_grid(
    layers: Sequence[Layer],
    quantizers: Mapping[str, Quantizer],
    channel_min: NDArray[np.float32],
    channel_max: NDArray[np.float32],
    source: str,
) -> _Grid:
    """One scale for all readers of a tensor: the largest range that ModelOpt gave any of them."""
    found = [quantizers[layer.name] for layer in layers]
    amax = max(quantizer.input_amax for quantizer in found)
    notes = {"s": f"ModelOpt ({source}): amax {amax:.4g}", "z": "ModelOpt's grids are symmetric"}
    factors = [
        np.ones(layer.in_channels, np.float32) if quantizer.pre_quant_scale is None else quantizer.pre_quant_scale
        for layer, quantizer in zip(layers, found, strict=True)
    ]
    agreed = all(np.array_equal(factor, factors[0]) for factor in factors)
    inverse_k = None
    if any(quantizer.pre_quant_scale is not None for quantizer in found):
        # One multiply serves all readers. ModelOpt itself, where it fuses layers with one input for its export, takes
        # the mean of their factors and measures anew.
        mean = np.mean(factors, axis=0)
        inverse_k = np.array([float16_exact(value) for value in mean], dtype=np.float32)
        notes["k"] = "SmoothQuant's pre_quant_scale"
    if inverse_k is not None and not agreed:
        amax = float((np.maximum(np.abs(channel_min), np.abs(channel_max)).max(axis=0) * inverse_k).max())
        notes["k"] = f"mean of the pre_quant_scale of {len(layers)} layers that share this input"
        notes["s"] = (
            f"amax {amax:.4g} of the shared input after that mean: ModelOpt ({source}) smooths each layer alone"
        )
    elif len(layers) > 1:
        notes["s"] += f", the largest of {len(layers)} layers that share this input"
    return _Grid(float16_exact(amax / _QMAX), inverse_k, agreed, notes)


def _plan_layer(
    layer: Layer, weight: NDArray[np.float32], quantizer: Quantizer, grid: _Grid, statistics: ActivationStatistics
) -> LayerPlan:
    if grid.inverse_k is not None:
        weight = weight / grid.inverse_k.reshape(1, -1, *([1] * (weight.ndim - 2)))
    amax = np.broadcast_to(quantizer.weight_amax, layer.out_channels)
    if not grid.agreed:
        amax = np.abs(weight).reshape(len(weight), -1).max(axis=1)
    scale = np.array([float16_exact(value / _QMAX) for value in amax], dtype=np.float32)
    codes = quantize_weight(weight, scale)
    one_bin = np.zeros(len(statistics.timestep_edges) - 1, dtype=np.int64)
    output_scale, output_zero_point = output_grid(layer, None, statistics, one_bin, PlanOptions())
    return LayerPlan(
        layer=layer,
        precision="int8",
        scale=grid.scale,
        inverse_k=grid.inverse_k,
        weight_codes=codes,
        weight_scale=scale,
        output_scale=output_scale,
        output_zero_point=output_zero_point,
        notes=grid.notes,
        weight_sqnr_db=weight_sqnr_db(weight, codes, scale),
    )


def _refuse_nonsense(path: Path, key: str, value: NDArray[np.float32]) -> None:
    if not len(value) or not np.isfinite(value).all() or (value < 0).any():
        raise InputError(f"{key} in {path} is empty, negative, NaN or infinite; quantize the network again")
    if key.endswith(f"{_INPUT}._amax") and len(value) != 1:
        raise InputError(
            f"{key} in {path} has {len(value)} values; an input has one scale per tensor: use a configuration with "
            "axis None for inputs"
        )


def _refuse_misfit(layer: Layer, quantizer: Quantizer, source: str) -> None:
    amax, factor = quantizer.weight_amax, quantizer.pre_quant_scale
    if len(amax) not in (1, layer.out_channels):
        raise InputError(
            f"{source} has {len(amax)} weight ranges for {layer.name}, which has {layer.out_channels} output channels; "
            "it is of another network"
        )
    if factor is not None and len(factor) != layer.in_channels:
        raise InputError(
            f"{source} has {len(factor)} pre_quant_scale values for {layer.name}, which has {layer.in_channels} input "
            "channels; it is of another network"
        )
