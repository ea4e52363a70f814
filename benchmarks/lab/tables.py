"""The rows of every letter.

Where a letter does not ask for something else, plans have ranges by the squared error and static scales (one step bin),
as the papers have them.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any, Literal

from lab.grids import regridded
from lab.laboratory import Laboratory, Skipped
from lab.operations import MU, OPERATIONS, PREVIOUS, SIGMA, operation_numbers
from lab.runner import Rows
from lab.sources import source_rows, timestep_rows
from lib.case import PLAIN, session_for, write_float
from lib.peers import CalibrationMethod, modelopt_session, quantized_static
from lib.switches import split_case

from qdm_calibration.plan import PlanOptions
from qdm_calibration.reconstruct import ReconstructOptions, reconstruct
from qdm_deploy.artifacts.plan import Target
from qdm_deploy.backends import OnnxRuntimeSession

Numbers = dict[str, float]

# Measures of a range that `build` does not offer.
_LABORATORY = ("l1", "cosine", "kl")

# Ranges by the squared error, which serves the metric of the tables; the default of `build` clips less (ADR 0005).
STATIC = PlanOptions(ranges="mse", step_bins=1)
W4 = replace(STATIC, weight_bits=4)


def _from_source(source: str, lab: Laboratory) -> Numbers:
    return lab.planned(lab.case(source, partial(source_rows, lab, source)), STATIC)


def _at_timesteps(strategy: str, lab: Laboratory) -> Numbers:
    return lab.planned(lab.case(f"t {strategy}", partial(timestep_rows, lab, strategy)), STATIC)


def _with_ranges(method: Any, lab: Laboratory) -> Numbers:
    case = lab.case()
    if method in _LABORATORY:
        plan = regridded(case.checkpoint.unet, case.plan(STATIC), case.statistics, method)
    else:
        plan = case.plan(replace(STATIC, ranges=method))
    return lab.simulated(lab.case().checkpoint, plan) | lab.finished(lab.case(), plan)


def _nearest(lab: Laboratory) -> Numbers:
    return lab.planned(lab.case(), W4) | lab.pictured(lab.case(), lab.case().plan(W4))


def _learned(unit: Literal["layer", "block"], lab: Laboratory) -> Numbers:
    case = lab.case()
    options = ReconstructOptions(iterations=lab.settings.reconstruct_iterations, seed=lab.seed, unit=unit)
    plan = reconstruct(case.checkpoint.unet, case.plan(W4), case.calibration, options)
    return lab.simulated(case.checkpoint, plan) | lab.pictured(case, plan)


def _shortcut(form: Literal["none", "split", "branch"], bits: int, lab: Laboratory) -> Numbers:
    case = split_case(lab.case()) if form == "split" else lab.case()
    plan = case.plan(replace(STATIC, concat_scales="none" if form == "split" else form, weight_bits=bits))
    # The paper's distances are of W4A8; with 8-bit weights the network's output says more.
    return lab.simulated(case.checkpoint, plan) | (lab.pictured(case, plan) if bits == 4 else {})


def _gains(bins: int, bits: int, lab: Laboratory) -> Numbers:
    case = lab.case()
    plan = case.plan(replace(STATIC, step_bins=bins))
    if bits != 8:
        plan = regridded(case.checkpoint.unet, plan, case.statistics, "mse", bits=bits)
    return lab.simulated(case.checkpoint, plan, bits)


def _ours(options: dict[str, Any], target: Target, lab: Laboratory) -> Numbers:
    plan = lab.shared(f"built {sorted(options)}", lambda: lab.case().built(**options))
    with TemporaryDirectory() as folder, session_for(lab.case(), plan, target, Path(folder)) as session:
        return lab.measured(session)


def _modelopt(config: str, lab: Laboratory) -> Numbers:
    if find_spec("modelopt") is None:
        raise Skipped("needs ModelOpt: pip install 'qdm-deploy[modelopt]'")
    with modelopt_session(lab.case(), config) as session:
        return lab.measured(session)


def _static(method: CalibrationMethod, lab: Laboratory) -> Numbers:
    with TemporaryDirectory() as folder:
        graph = quantized_static(lab.case(), write_float(lab.case(), Path(folder)), method)
        with OnnxRuntimeSession(graph) as session:
            return lab.measured(session)


TABLES: Mapping[str, Rows] = MappingProxyType(
    {
        "a": {
            "pure noise at every t": partial(_from_source, "noise"),
            "real images at every t": partial(_from_source, "images"),
            "q(x_t | x_0) of real images": partial(_from_source, "forward"),
            "denoising trajectory (ours)": partial(_from_source, "trajectory"),
        },
        "b": {f"single timestep, {name}": partial(_at_timesteps, name) for name in ("first", "middle", "last")}
        | {"uniform": partial(_at_timesteps, "uniform"), "NDTC": partial(_at_timesteps, "ndtc")},
        "c": {
            "min-max": partial(_with_ranges, "minmax"),
            "percentile 99.99": partial(_with_ranges, "percentile"),
            "MSE": partial(_with_ranges, "mse"),
            "Lp, p = 2.4": partial(_with_ranges, "lp"),
            "L1": partial(_with_ranges, "l1"),
            "cosine": partial(_with_ranges, "cosine"),
            "KL": partial(_with_ranges, "kl"),
        },
        "d": {
            "quantize mu": partial(operation_numbers, (MU,)),
            "quantize Sigma": partial(operation_numbers, (SIGMA,)),
            "quantize x_{t-1}": partial(operation_numbers, (PREVIOUS,)),
            "quantize mu + Sigma + x_{t-1}": partial(operation_numbers, OPERATIONS),
        },
        "e": {
            "nearest": _nearest,
            "AdaRound, layer-wise": partial(_learned, "layer"),
            "AdaRound, block-wise": partial(_learned, "block"),
        },
        "f": {
            f"{name}, W{bits}A8": partial(_shortcut, form, bits)
            for (name, form), bits in product((("shared", "none"), ("split", "split"), ("folded", "branch")), (8, 4))
        },
        "g": {f"K = {bins}, A{bits}": partial(_gains, bins, bits) for bits, bins in product((8, 6), (1, 2, 4, 8))},
        "h": {
            f"ours, {name}, {target}": partial(_ours, options, target)
            for (name, options), target in product(
                (("symmetric min-max", PLAIN), ("default", {})), ("tensorrt", "onnxruntime")
            )
        }
        | {
            "modelopt INT8_DEFAULT_CFG": partial(_modelopt, "INT8_DEFAULT_CFG"),
            "modelopt, diffusers filter": partial(_modelopt, "INT8_DIFFUSERS"),
            "modelopt INT8_SMOOTHQUANT_CFG": partial(_modelopt, "INT8_SMOOTHQUANT_CFG"),
            "quantize_static, min-max": partial(_static, CalibrationMethod.MinMax),
            "quantize_static, percentile": partial(_static, CalibrationMethod.Percentile),
        },
    }
)
