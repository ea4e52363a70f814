"""What a row of a step costs on one core, in milliseconds, by the number of rows that are run together.

In throughput mode a batch is cut into parts, and each core takes whole parts (``runtime/row_parts.py``): larger ones
reuse each weight more often, smaller ones stay in the core's caches from layer to layer. One thread, both CPU targets,
every session in a process of its own, in turn.

    python benchmarks/part_sizes.py --save
"""

import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from lib.apart import Apart, opened_stepper
from lib.bench import CPU_SESSIONS, case_to_time, finish, parser, say, write_graph
from qdm_deploy.runtime.random_inputs import random_inputs

from qdm_deploy.backends.openvino.session import KEPT_BATCH_SIZES
from qdm_deploy.runtime.timing import SETTLING


def main() -> None:
    arguments = parser("Rows of a part.")
    arguments.add_argument("--models", default="fashion,cifar10")
    arguments.add_argument("--rows", default="2,4,8,16", help=f"at most {KEPT_BATCH_SIZES}: more are compiled anew")
    arguments.add_argument("--turns", type=int, default=12)
    given = arguments.parse_args()
    sizes = [int(size) for size in given.rows.split(",")]
    rows: list[dict[str, Any]] = []
    for name in given.models.split(","):
        model = case_to_time(name)
        plan = model.built()
        with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
            opened: dict[str, Apart] = {}
            for target, session in CPU_SESSIONS.items():
                graph = write_graph(model, plan, target, Path(scratch) / target)
                made = partial(opened_stepper, partial(session, graph, threads=1))
                opened[target] = stack.enter_context(Apart(made))
            inputs = {size: random_inputs(model.checkpoint.spec, size) for size in sizes}
            wanted = {target: one.ask("names") for target, one in opened.items()}
            times: dict[tuple[str, int], list[float]] = {}
            for turn in range(given.turns):
                say(f"{name}: turn {turn + 1} of {given.turns}")
                for target, one in opened.items():
                    for size in sizes:
                        one.ask("prepare", {key: inputs[size][key] for key in wanted[target]})
                        times.setdefault((target, size), []).extend(one.ask("turn", 2, SETTLING))
        for (target, size), values in times.items():
            median, least = (float(of(values)) / size for of in (np.median, np.min))
            rows.append({"model": name, "target": target, "rows": size, "median ms": median, "least ms": least})
    finish("part-sizes", list(rows[0]), rows, {"turns": given.turns}, save=given.save)


if __name__ == "__main__":
    main()
