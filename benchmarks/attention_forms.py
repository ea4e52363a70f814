"""What the openvino target gains by attention in bfloat16, by how many scores a head must have to be cast.

One plan, emitted with a few limits (``TargetForm.least_scores``); graphs are timed in turn, each in a process of
its own, when the model they come from is no longer in memory. `x0 SQNR dB` is that of the denoised sample against the
float graph, on random inputs.

    python benchmarks/attention_forms.py --models cifar10 --batch 4 --mode throughput --save
"""

import tempfile
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from lib.apart import Apart, opened_stepper, timed_apart, turn_medians
from lib.bench import case_to_time, finish, parser, save_form, say, write_float
from numpy.typing import NDArray

from qdm_deploy.artifacts.model_spec import ModelSpec
from qdm_deploy.backends import OnnxRuntimeSession, OpenVinoSession
from qdm_deploy.runtime import StepSession
from qdm_deploy.runtime.random_inputs import random_inputs
from qdm_export.passes.bfloat16_attention import LEAST_SCORES, Bfloat16Attention
from qdm_export.targets import FORMS, emit

_LIMITS = {"float32": None, "from 1024 x 1024 scores": 1024 * 1024, "from 256 x 256": LEAST_SCORES, "all": 1}


def main() -> None:
    arguments = parser("Attention on OpenVINO.")
    arguments.add_argument("--models", default="cifar10")
    arguments.add_argument("--batch", type=int, default=4)
    arguments.add_argument("--mode", default="latency", choices=("latency", "throughput"))
    arguments.add_argument("--runs", type=int, default=50)
    given = arguments.parse_args()
    rows: list[dict[str, Any]] = []
    for name in given.models.split(","):
        with tempfile.TemporaryDirectory() as scratch:
            spec, reference, graphs = _written(name, Path(scratch))
            inputs = random_inputs(spec, given.batch)
            with OnnxRuntimeSession(reference) as session:
                expected = _x0(session, inputs)
            quality: dict[str, float] = {}
            for label, graph in graphs.items():
                with OpenVinoSession(graph) as session:
                    error = _x0(session, inputs) - expected
                quality[label] = float(10 * np.log10((expected**2).sum() / (error**2).sum()))
                say(f"{label}: {quality[label]:.2f} dB")
            with ExitStack() as stack:
                opened = {
                    label: stack.enter_context(
                        Apart(partial(opened_stepper, partial(OpenVinoSession, graph, mode=given.mode)))
                    )
                    for label, graph in graphs.items()
                }
                times = timed_apart(opened, inputs, runs=given.runs, seconds=400)
        turns = {label: turn_medians(values) for label, values in times.items()}
        rows += [
            {
                "model": name,
                "batch": given.batch,
                "attention in bfloat16": label,
                "median ms": float(np.median(values)),
                "least ms": float(np.min(values)),
                "faster": float(np.median(turns["float32"] / turns[label])),
                "x0 SQNR dB": quality[label],
            }
            for label, values in times.items()
        ]
    finish("attention-forms", list(rows[0]), rows, {"runs": given.runs, "mode": given.mode}, save=given.save)


def _written(name: str, folder: Path) -> tuple[ModelSpec, Path, dict[str, Path]]:
    """The float graph of a model and its openvino graphs, by limit; of equal graphs the first."""
    model = case_to_time(name)
    plan, reference = model.built(keep_fp="none"), write_float(model, folder / "float")
    graphs: dict[str, Path] = {}
    known: set[bytes] = set()
    for label, least in _LIMITS.items():
        whole = FORMS["openvino"]
        form = whole.without(Bfloat16Attention) if least is None else replace(whole, least_scores=least)
        emitted = emit(model.graph, plan, "openvino", form=form).model
        path = save_form(emitted, folder / label, "openvino")
        if path.read_bytes() not in known:
            graphs[label] = path
        known.add(path.read_bytes())
    return model.checkpoint.spec, reference, graphs


def _x0(session: StepSession, inputs: dict[str, NDArray[Any]]) -> NDArray[np.float64]:
    return session.run({name: inputs[name] for name in session.input_names}).x0.astype(np.float64)


if __name__ == "__main__":
    main()
