"""What each part of the openvino target's form is worth: every one left out alone, beside the whole form.

One plan, emitted again and again; what is left out stays as the exporter has it (``TargetForm``). In float32 and, where
asked for, with what is not INT8 in bfloat16. Every graph runs in a process of its own, in turn; `slower` is the median
over the turns of the ratio to the whole form. `first step s` compiles the graph for a batch size. `eps SQNR dB` is
teacher-forced against the float model.

    python benchmarks/openvino_forms.py --save
    python benchmarks/openvino_forms.py --models fashion --batches 16 --rest f32,bf16 --modes throughput
"""

import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import Any

import numpy as np
from lib.apart import Apart, ApartSession, opened_stepper, timed_apart, turn_medians
from lib.bench import case_to_time, finish, parser, save_form, say
from numpy.typing import NDArray
from step_latency import reference_of, sqnr_of

from qdm_deploy.backends import OpenVinoSession
from qdm_deploy.runtime.random_inputs import random_inputs
from qdm_export.passes.attention_layout import AttentionInput, AttentionLayout
from qdm_export.passes.bfloat16_attention import Bfloat16Attention
from qdm_export.passes.bfloat16_kernels import Bfloat16Kernels
from qdm_export.passes.moments_norm import MomentsNormForm
from qdm_export.passes.rational_silu import RationalSilu
from qdm_export.passes.time_projections import TimeProjections
from qdm_export.passes.upsample_phases import UpsamplePhases
from qdm_export.targets import FORMS, emit

WHOLE = FORMS["openvino"]
LEFT_OUT = {
    "nothing": WHOLE,
    "norms from moments": WHOLE.without(MomentsNormForm),
    "upsampling in phases": WHOLE.without(UpsamplePhases),
    "attention layout": WHOLE.without(AttentionInput, AttentionLayout),
    "bfloat16 in kept layers": WHOLE.without(Bfloat16Kernels),
    "bfloat16 in attention": WHOLE.without(Bfloat16Attention),
    "rational SiLU": WHOLE.without(RationalSilu),
    "time projections looked up": WHOLE.without(TimeProjections),
}


def main() -> None:
    arguments = parser("Parts of the openvino target's form.")
    arguments.add_argument("--models", default="fashion,cifar10")
    arguments.add_argument("--batches", default="4,16")
    arguments.add_argument("--modes", default="throughput", help="latency, throughput or both")
    arguments.add_argument("--rest", default="f32", help="precision of what is not INT8: f32, bf16 or both")
    arguments.add_argument("--runs", type=int, default=50)
    given = arguments.parse_args()
    ways = [(rest, mode) for rest in given.rest.split(",") for mode in given.modes.split(",")]
    rows: list[dict[str, Any]] = []
    for name in given.models.split(","):
        model = case_to_time(name)
        plan, reference = model.built(), reference_of(model)
        with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
            opened: dict[tuple[str, str, str], Apart] = {}
            for left_out, form in LEFT_OUT.items():
                emitted = emit(model.graph, plan, "openvino", form=form).model
                graph = save_form(emitted, Path(scratch) / left_out, "openvino")
                for rest, mode in ways:
                    session = partial(OpenVinoSession, graph, precision=rest, mode=mode)
                    opened[left_out, rest, mode] = stack.enter_context(Apart(partial(opened_stepper, session)))
            sizes = map(int, given.batches.split(","))
            batches = {size: random_inputs(model.checkpoint.spec, size) for size in sizes}
            say(f"{name}: compiling {len(opened)} graphs for each batch size")
            compiled = {
                batch: {key: _first_step_s(one, inputs) for key, one in opened.items()}
                for batch, inputs in batches.items()
            }
            quality = {key: fmean(sqnr_of(reference, ApartSession(one), model)) for key, one in opened.items()}
            for batch, inputs in batches.items():
                say(f"{name}, batch {batch}: timing {len(opened)} graphs in turn")
                timed = timed_apart(opened, inputs, runs=given.runs, seconds=400)
                turns = {key: turn_medians(times) for key, times in timed.items()}
                rows += [
                    {
                        "model": name,
                        "batch": batch,
                        "rest": rest,
                        "mode": mode,
                        "left out": left_out,
                        "median ms": float(np.median(timed[left_out, rest, mode])),
                        "least ms": float(np.min(timed[left_out, rest, mode])),
                        "slower": float(np.median(turns[left_out, rest, mode] / turns["nothing", rest, mode])),
                        "first step s": compiled[batch][left_out, rest, mode],
                        "eps SQNR dB": quality[left_out, rest, mode],
                    }
                    for rest, mode in ways
                    for left_out in LEFT_OUT
                ]
    finish("openvino-forms", list(rows[0]), rows, {"runs": given.runs}, save=given.save)


def _first_step_s(one: Apart, inputs: Mapping[str, NDArray[Any]]) -> float:
    """Seconds of the first step of a batch size, which compiles the graph for it."""
    start = perf_counter()
    one.ask("run", {name: inputs[name] for name in one.ask("names")})
    return perf_counter() - start


if __name__ == "__main__":
    main()
