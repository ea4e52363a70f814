"""What the openvino target gains by computing normalizations from their moments, in the layout of the convolutions.

One plan, emitted with GroupNormalization as the exporter has it and with moments; in float32 and, where the CPU has
it, with the rest in bfloat16. Every graph runs in a process of its own, in turn. `eps SQNR dB` is teacher-forced
against the float model.

    python benchmarks/norm_forms.py --save
"""

import tempfile
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from apart import Apart, ApartSession, opened_stepper, timed_apart
from bench import case_to_time, finish, parser, save_form, say
from step_latency import reference_of, sqnr_of

from qdm_deploy.runtime import OpenVinoSession
from qdm_deploy.runtime.random_inputs import random_inputs
from qdm_export.targets import FORMS, emit


def main() -> None:
    arguments = parser("Forms of GroupNormalization on OpenVINO.")
    arguments.add_argument("--models", default="fashion,cifar10")
    arguments.add_argument("--batches", default="4,16")
    arguments.add_argument("--runs", type=int, default=25)
    given = arguments.parse_args()
    rows: list[dict[str, Any]] = []
    for name in given.models.split(","):
        model = case_to_time(name)
        plan, reference = model.built(), reference_of(model)
        with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
            opened: dict[tuple[str, str, str], Apart] = {}
            moments = FORMS["openvino"]
            for form, written in {"GroupNormalization": replace(moments, norm=None), "moments": moments}.items():
                graph = save_form(emit(model.graph, plan, "openvino", form=written), Path(scratch) / form, "openvino")
                for rest in ("f32", "bf16"):
                    for mode in ("latency", "throughput"):
                        session = partial(OpenVinoSession, graph, precision=rest, mode=mode)
                        opened[form, rest, mode] = stack.enter_context(Apart(partial(opened_stepper, session)))
            quality = {key: fmean(sqnr_of(reference, ApartSession(one), model)) for key, one in opened.items()}
            for batch in map(int, given.batches.split(",")):
                say(f"{name}, batch {batch}: timing {len(opened)} graphs in turn")
                inputs = random_inputs(model.checkpoint.spec, batch)
                for (form, rest, mode), values in timed_apart(opened, inputs, runs=given.runs, seconds=300).items():
                    rows.append(
                        {
                            "model": name,
                            "batch": batch,
                            "form": form,
                            "rest": rest,
                            "mode": mode,
                            "median ms": float(np.median(values)),
                            "least ms": float(np.min(values)),
                            "eps SQNR dB": quality[form, rest, mode],
                        }
                    )
    columns = ["model", "batch", "form", "rest", "mode", "median ms", "least ms", "eps SQNR dB"]
    finish("norm-forms", columns, rows, {"runs": given.runs}, save=given.save)


if __name__ == "__main__":
    main()
