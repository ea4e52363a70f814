"""What it costs to keep a few layers in float on the openvino target: in INT8 after all, in float32, in bfloat16.

The default plan of the embedded model, which keeps the noisiest layers out of INT8, with these multiplied in float32
and (but for shortcuts) in bfloat16, beside the plan that keeps none; and with everything that is not INT8 in bfloat16.
Every graph runs in a process of its own, in turn. SQNR is teacher-forced against the float model, over a few steps.

    python benchmarks/kept_layers.py --save
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

from qdm_deploy.backends import OpenVinoSession
from qdm_deploy.runtime.random_inputs import random_inputs
from qdm_export.passes.bfloat16_kernels import Bfloat16Kernels
from qdm_export.targets import FORMS, emit

MODES = ("latency", "throughput")


def main() -> None:
    arguments = parser("Layers kept in float on OpenVINO.")
    arguments.add_argument("--batches", default="4,16")
    arguments.add_argument("--runs", type=int, default=25)
    given = arguments.parse_args()
    model = case_to_time("fashion")
    reference = reference_of(model)
    nothing, kept = model.built(keep_fp="none"), model.built()
    forms = {
        "none kept": (nothing, True, "f32"),
        "float32": (kept, False, "f32"),
        "bfloat16": (kept, True, "f32"),
        "bfloat16, the rest too": (kept, True, "bf16"),
    }
    count = len(nothing.quantized) - len(kept.quantized)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        opened: dict[tuple[str, str], Apart] = {}
        for name, (plan, bfloat16, rest) in forms.items():
            form = FORMS["openvino"] if bfloat16 else FORMS["openvino"].without(Bfloat16Kernels)
            emitted = emit(model.graph, plan, "openvino", form=form).model
            graph = save_form(emitted, Path(scratch) / name, "openvino")
            for mode in MODES:
                opener = partial(opened_stepper, partial(OpenVinoSession, graph, mode=mode, precision=rest))
                opened[name, mode] = stack.enter_context(Apart(opener))
        sqnr = {key: sqnr_of(reference, ApartSession(one), model) for key, one in opened.items()}
        for batch in map(int, given.batches.split(",")):
            say(f"batch {batch}: timing {len(opened)} graphs in turn")
            inputs = random_inputs(model.checkpoint.spec, batch)
            timed = timed_apart(opened, inputs, runs=given.runs, seconds=300)
            for (name, mode), values in timed.items():
                whole = timed["float32", mode]
                rows.append(
                    {
                        "batch": batch,
                        "mode": mode,
                        "kept layers": name,
                        "layers": 0 if name == "none kept" else count,
                        "median ms": float(np.median(values)),
                        "least ms": float(np.min(values)),
                        "faster, medians": float(np.median(whole) / np.median(values)),
                        "faster, least": float(np.min(whole) / np.min(values)),
                        "eps SQNR dB": fmean(sqnr[name, mode]),
                        "last step dB": sqnr[name, mode][-1],
                    }
                )
    finish("kept-layers", list(rows[0]), rows, {"runs": given.runs}, save=given.save)


if __name__ == "__main__":
    main()
