"""What is not INT8 on OpenVINO: in float32, in bfloat16 by the hint alone, and in bfloat16 but for what is kept.

The default plan of a model in the openvino target's form. Every session runs in a process of its own, in turn;
`faster` is the median over the turns of the ratio to float32. SQNR is teacher-forced against the float model, over a
few steps, the mean and the last one (t = 0).

    python benchmarks/bfloat16_rest.py --save
"""

import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from lib.apart import Apart, ApartSession, opened_stepper, timed_apart, turn_medians
from lib.bench import case_to_time, finish, parser, say, write_graph
from lib.hinted_session import HintedSession
from qdm_deploy.runtime.random_inputs import random_inputs
from step_latency import reference_of, sqnr_of

from qdm_deploy.backends import OpenVinoSession

COLUMNS = ("model", "batch", "mode", "rest", "median ms", "least ms", "faster", "SQNR dB", "last step dB")
MODES = ("throughput", "latency")


def main() -> None:
    arguments = parser("Float32 and bfloat16 for what is not INT8 on OpenVINO.")
    arguments.add_argument("--models", default="fashion,cifar10")
    arguments.add_argument("--batches", default="4,16")
    arguments.add_argument("--runs", type=int, default=40)
    given = arguments.parse_args()
    rows: list[dict[str, Any]] = []
    for name in given.models.split(","):
        model = case_to_time(name)
        reference = reference_of(model)
        with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
            graph = write_graph(model, model.built(), "openvino", Path(scratch))
            rests = {
                "float32": partial(OpenVinoSession, graph, precision="f32"),
                "bfloat16": partial(HintedSession, graph),
                "bfloat16 but for what is kept": partial(OpenVinoSession, graph, precision="bf16"),
            }
            opened: dict[tuple[str, str], Apart] = {
                (rest, mode): stack.enter_context(Apart(partial(opened_stepper, partial(session, mode=mode))))
                for mode in MODES
                for rest, session in rests.items()
            }
            quality = {key: sqnr_of(reference, ApartSession(one), model) for key, one in opened.items()}
            for batch in map(int, given.batches.split(",")):
                say(f"{name}, batch {batch}: timing {len(opened)} sessions in turn")
                timed = timed_apart(opened, random_inputs(model.checkpoint.spec, batch), runs=given.runs, seconds=240)
                for (rest, mode), times in timed.items():
                    base = turn_medians(timed["float32", mode])
                    rows.append(
                        {
                            "model": name,
                            "batch": batch,
                            "mode": mode,
                            "rest": rest,
                            "median ms": float(np.median(times)),
                            "least ms": float(np.min(times)),
                            "faster": float(np.median(base / turn_medians(times))),
                            "SQNR dB": fmean(quality[rest, mode]),
                            "last step dB": quality[rest, mode][-1],
                        }
                    )
    finish("bfloat16-rest", COLUMNS, rows, {"runs": given.runs}, save=given.save)


if __name__ == "__main__":
    main()
