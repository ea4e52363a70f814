"""The rows of every letter.

Where a letter does not ask for something else, plans have ranges by the squared error and static scales (one step bin),
as the papers have them.
"""

import dataclasses
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, Literal

from ablation import FULL, PLAIN, session_for
from lab.grids import Measure, regridded
from lab.laboratory import Laboratory, Settings
from lab.operations import MU, OPERATIONS, PREVIOUS, SIGMA, operation_numbers
from lab.row import Row, Skipped
from lab.sources import SINGLE_STEPS, UNIFORM_STEPS, source_rows, timestep_rows
from lib.bench import Case
from lib.peer_models import CALIBRATION_STEPS, CalibrationMethod, modelopt_session, quantized_static

from qdm_calibration.plan import PlanOptions
from qdm_calibration.ranges import METHODS
from qdm_calibration.reconstruct import ReconstructOptions, reconstruct
from qdm_deploy.artifacts.plan import QuantizationPlan, Target

__all__ = ["LETTERS", "rows_of"]

# Ranges by the squared error, which serves the metric of the tables; the default of `build` clips less (ADR 0005).
STATIC = PlanOptions(ranges="mse", step_bins=1)
CONFIGS = {
    "modelopt INT8_DEFAULT_CFG": "INT8_DEFAULT_CFG",
    "modelopt, diffusers filter": "INT8_DIFFUSERS",
    "modelopt INT8_SMOOTHQUANT_CFG": "INT8_SMOOTHQUANT_CFG",
}


def rows_of(letter: str, settings: Settings) -> list[Row]:
    """The rows of one table, in the order in which they are shown."""
    return LETTERS[letter](settings)


def _sources(settings: Settings) -> list[Row]:
    names = {
        "pure noise at every t": "noise",
        "real images at every t": "images",
        "q(x_t | x_0) of real images": "forward",
        "denoising trajectory (ours)": "trajectory",
    }

    def measure(source: str) -> Callable[[Laboratory], dict[str, float]]:
        def numbers(lab: Laboratory) -> dict[str, float]:
            case = lab.case() if source == "trajectory" else lab.case(source, source_rows(lab, source))
            return lab.planned(case, STATIC)

        return numbers

    rows = _default_rows(settings)
    return [_plan_row("a", name, STATIC, measure(key), settings, rows, source=key) for name, key in names.items()]


def _timesteps(settings: Settings) -> list[Row]:
    names = {**{f"single timestep, {name}": name for name in SINGLE_STEPS}, "uniform": "uniform", "NDTC": "ndtc"}

    def measure(strategy: str) -> Callable[[Laboratory], dict[str, float]]:
        return lambda lab: lab.planned(lab.case(f"t {strategy}", timestep_rows(lab, strategy)), STATIC)

    rows = settings.samples * (UNIFORM_STEPS + 1)
    # One run of `rows` trajectories is shared by the three single timesteps.
    more = dict.fromkeys(SINGLE_STEPS, rows * CALIBRATION_STEPS // 3)
    return [
        _plan_row(
            "b",
            name,
            STATIC,
            measure(key),
            settings,
            rows + more.get(key, settings.samples * CALIBRATION_STEPS),
            timesteps=key,
            uniform_steps=UNIFORM_STEPS,
        )
        for name, key in names.items()
    ]


def _ranges(settings: Settings) -> list[Row]:
    names = {"minmax": "min-max", "percentile": "percentile 99.99", "mse": "MSE", "lp": "Lp, p = 2.4"}
    others: dict[Measure, str] = {"l1": "L1", "cosine": "cosine", "kl": "KL"}

    def measure(make: Callable[[Case], QuantizationPlan]) -> Callable[[Laboratory], dict[str, float]]:
        def numbers(lab: Laboratory) -> dict[str, float]:
            case = lab.case()
            plan = make(case)
            return lab.simulated(case.checkpoint, plan) | lab.finished(case, plan)

        return numbers

    def ours(options: PlanOptions) -> Callable[[Case], QuantizationPlan]:
        return lambda case: case.plan(options)

    def papers(measure: Measure) -> Callable[[Case], QuantizationPlan]:
        return lambda case: regridded(case.checkpoint.unet, case.plan(STATIC), case.statistics, measure)

    more = settings.seeds * settings.steps
    return [
        *(
            _plan_row("c", names[method], options, measure(ours(options)), settings, more, finished=True)
            for method in METHODS
            for options in [dataclasses.replace(STATIC, ranges=method)]
        ),
        *(
            _plan_row("c", name, STATIC, measure(papers(which)), settings, more, finished=True, error=which)
            for which, name in others.items()
        ),
    ]


def _operations(settings: Settings) -> list[Row]:
    chosen = {
        "quantize mu": (MU,),
        "quantize Sigma": (SIGMA,),
        "quantize x_{t-1}": (PREVIOUS,),
        "quantize mu + Sigma + x_{t-1}": OPERATIONS,
    }

    def measure(quantized: Sequence[str]) -> Callable[[Laboratory], dict[str, float]]:
        return lambda lab: operation_numbers(lab, quantized)

    cost = settings.seeds * settings.steps
    return [
        Row("d", name, {"operations": list(quantized), "bits": 8, "sampler": "ddpm"}, measure(quantized), cost)
        for name, quantized in chosen.items()
    ]


def _reconstruction(settings: Settings) -> list[Row]:
    options = dataclasses.replace(STATIC, weight_bits=4)

    def measure(unit: Literal["layer", "block"]) -> Callable[[Laboratory], dict[str, float]]:
        def numbers(lab: Laboratory) -> dict[str, float]:
            case = lab.case()
            learned = reconstruct(
                case.checkpoint.unet,
                case.plan(options),
                case.calibration,
                ReconstructOptions(iterations=settings.iterations, seed=lab.seed, unit=unit),
            )
            return lab.simulated(case.checkpoint, learned) | lab.pictured(case, learned)

        return numbers

    def nearest(lab: Laboratory) -> dict[str, float]:
        case = lab.case()
        return lab.planned(case, options) | lab.pictured(case, case.plan(options))

    # A training step is some three evaluations of a batch on one unit; all units together are about one network.
    cost = settings.iterations * ReconstructOptions().batch_size * 3
    return [
        _plan_row("e", "nearest", options, nearest, settings, 0, pictures=_pictures(settings)),
        *(
            _plan_row(
                "e",
                f"AdaRound, {unit}-wise",
                options,
                measure(unit),
                settings,
                cost * (1 if unit == "block" else 2),
                unit=unit,
                iterations=settings.iterations,
                pictures=_pictures(settings),
            )
            for unit in ("layer", "block")
        ),
    ]


def _shortcuts(settings: Settings) -> list[Row]:
    forms: dict[str, Literal["none", "split", "branch"]] = {"shared": "none", "split": "split", "folded": "branch"}

    def measure(options: PlanOptions) -> Callable[[Laboratory], dict[str, float]]:
        def numbers(lab: Laboratory) -> dict[str, float]:
            case = lab.case(split=options.concat_scales == "split")
            # The paper's distances are of W4A8; with 8-bit weights the network's output says more.
            pictures = lab.pictured(case, case.plan(options)) if options.weight_bits == 4 else {}
            return lab.planned(case, options) | pictures

        return numbers

    return [
        _plan_row("f", f"{name}, W{bits}A8", options, measure(options), settings, 0, pictures=_pictures(settings))
        for name, form in forms.items()
        for bits in (8, 4)
        for options in [dataclasses.replace(STATIC, concat_scales=form, weight_bits=bits)]
    ]


def _gains(settings: Settings) -> list[Row]:
    def measure(bins: int, bits: int) -> Callable[[Laboratory], dict[str, float]]:
        def numbers(lab: Laboratory) -> dict[str, float]:
            case = lab.case()
            plan = case.plan(dataclasses.replace(STATIC, step_bins=bins))
            if bits != 8:
                plan = regridded(case.checkpoint.unet, plan, case.statistics, "mse", bits=bits)
            return lab.simulated(case.checkpoint, plan, bits)

        return numbers

    return [
        _plan_row(
            "g",
            f"K = {bins}, A{bits}",
            STATIC,
            measure(bins, bits),
            settings,
            0,
            step_bins=bins,
            activation_bits=bits,
        )
        for bits in (8, 6)
        for bins in (1, 2, 4, 8)
    ]


def _peers(settings: Settings) -> list[Row]:
    def ours(options: dict[str, Any], target: Target) -> Callable[[Laboratory], dict[str, float]]:
        def numbers(lab: Laboratory) -> dict[str, float]:
            case = lab.case()
            plan = lab.shared(f"built {options}", lambda: case.built(**options))
            folder = settings.scratch / f"ours-{len(options)}-{lab.seed}"
            with session_for(case, plan, target, folder)[1] as session:
                return lab.measured(session)

        return numbers

    def theirs(config: str) -> Callable[[Laboratory], dict[str, float]]:
        def numbers(lab: Laboratory) -> dict[str, float]:
            if find_spec("modelopt") is None:
                raise Skipped("needs ModelOpt: pip install 'qdm-deploy[modelopt]'")
            with modelopt_session(lab.case(), config) as session:
                return lab.measured(session)

        return numbers

    def static(method: CalibrationMethod) -> Callable[[Laboratory], dict[str, float]]:
        def numbers(lab: Laboratory) -> dict[str, float]:
            with quantized_static(lab.case(), method, settings.scratch / f"{method.name}-{lab.seed}") as session:
                return lab.measured(session)

        return numbers

    targets: tuple[Target, ...] = ("tensorrt", "onnxruntime")
    cost = settings.seeds * settings.steps + _default_rows(settings)
    return [
        *(
            Row("h", f"ours, {name}, {target}", {"build": options, "target": target}, ours(options, target), cost)
            for name, options in (("symmetric min-max", PLAIN), ("default", FULL))
            for target in targets
        ),
        *(Row("h", name, {"config": config}, theirs(config), cost) for name, config in CONFIGS.items()),
        *(
            Row("h", f"quantize_static, {name}", {"method": method.name}, static(method), cost)
            for name, method in (("min-max", CalibrationMethod.MinMax), ("percentile", CalibrationMethod.Percentile))
        ),
    ]


def _planned(letter: str, name: str, options: PlanOptions, settings: Settings) -> Row:
    """A row that is one plan on the default calibration set."""
    return _plan_row(letter, name, options, lambda lab: lab.planned(lab.case(), options), settings, 0)


def _plan_row(
    letter: str,
    name: str,
    options: PlanOptions,
    measure: Callable[[Laboratory], dict[str, float]],
    settings: Settings,
    more: int,
    **others: Any,
) -> Row:
    """A row whose key holds the plan's options and ``others``; ``more``: evaluations beside the measurement."""
    return Row(
        letter, name, {"plan": dataclasses.asdict(options), **others}, measure, settings.seeds * settings.steps + more
    )


def _pictures(settings: Settings) -> list[int]:
    """What decides a Frechet distance beside the plan."""
    return [settings.frechet_images, settings.frechet_steps]


def _default_rows(settings: Settings) -> int:
    """Rows of the default calibration set: every second of 50 steps, and the last."""
    return settings.samples * 26


LETTERS: dict[str, Callable[[Settings], list[Row]]] = {
    "a": _sources,
    "b": _timesteps,
    "c": _ranges,
    "d": _operations,
    "e": _reconstruction,
    "f": _shortcuts,
    "g": _gains,
    "h": _peers,
}
