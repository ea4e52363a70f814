"""What the CPU targets gain by running an upsampling and the convolution behind it as four small convolutions.

Three graphs for each target: whole convolutions with the weight scales they would have, whole ones with scales at
which the sums of weights fit, and the four phases of these. Every graph runs in a process of its own, in turn.
`eps SQNR dB` is teacher-forced against the float model.

    python benchmarks/upsample_forms.py --save
"""

import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from lib.apart import Apart, ApartSession, opened_stepper, timed_apart
from lib.bench import case_to_time, finish, parser, save_form, say
from step_latency import reference_of, sqnr_of

from qdm_deploy.artifacts.phase_sums import fits_phases
from qdm_deploy.artifacts.plan import Target
from qdm_deploy.backends import OnnxRuntimeSession, OpenVinoSession
from qdm_deploy.runtime.random_inputs import random_inputs
from qdm_export.passes.upsample_phases import UpsamplePhases
from qdm_export.targets import FORMS, emit

WAYS = ("whole, own scales", "whole", "phases")
SESSIONS: dict[Target, Any] = {"onnxruntime": OnnxRuntimeSession, "openvino": OpenVinoSession}


def main() -> None:
    arguments = parser("Forms of upsampling convolutions on CPUs.")
    arguments.add_argument("--models", default="fashion,cifar10")
    arguments.add_argument("--batches", default="4,16")
    arguments.add_argument("--runs", type=int, default=25)
    given = arguments.parse_args()
    rows: list[dict[str, Any]] = []
    for name in given.models.split(","):
        model = case_to_time(name)
        reference = reference_of(model)
        own, fitting = model.built(upsample_phases=False), model.built()
        plans = dict(zip(WAYS, (own, fitting, fitting), strict=True))
        layers = sum(fits_phases(plan) for plan in fitting.quantized)
        with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
            opened: dict[tuple[str, str, str], Apart] = {}
            for target, session in SESSIONS.items():
                for form, plan in plans.items():
                    chosen = FORMS[target] if form == "phases" else FORMS[target].without(UpsamplePhases)
                    model_of_form = emit(model.graph, plan, target, form=chosen).model
                    graph = save_form(model_of_form, Path(scratch) / target / form, target)
                    for mode in ("latency", "throughput"):
                        opener = partial(opened_stepper, partial(session, graph, mode=mode))
                        opened[target, form, mode] = stack.enter_context(Apart(opener))
            quality = {key: fmean(sqnr_of(reference, ApartSession(one), model)) for key, one in opened.items()}
            for batch in map(int, given.batches.split(",")):
                say(f"{name}, batch {batch}: timing {len(opened)} graphs in turn")
                inputs = random_inputs(model.checkpoint.spec, batch)
                timed = timed_apart(opened, inputs, runs=given.runs, seconds=300)
                for (target, form, mode), values in timed.items():
                    whole = timed[target, WAYS[0], mode]
                    rows.append(
                        {
                            "model": name,
                            "batch": batch,
                            "target": target,
                            "mode": mode,
                            "form": form,
                            "layers": layers if form == "phases" else 0,
                            "median ms": float(np.median(values)),
                            "least ms": float(np.min(values)),
                            "faster": float(np.median(whole) / np.median(values)),
                            "eps SQNR dB": quality[target, form, mode],
                        }
                    )
    columns = ["model", "batch", "target", "mode", "form", "layers", "median ms", "least ms", "faster", "eps SQNR dB"]
    finish("upsample-forms", columns, rows, {"runs": given.runs}, save=given.save)


if __name__ == "__main__":
    main()
