"""What the step gains of a bundle of the embedded model cost on CPUs: its graphs with them and without, in turn.

The cost is the median over the turns of the ratio of their medians, for the machine may change its speed from turn to
turn but seldom within one; ``low %`` and ``high %`` hold it in 95 of 100 repetitions (bootstrap over the turns).

The random DDPM CIFAR-10 of `step_latency.py` cannot show it: no range of a random network moves, so no layer has gains.

    python benchmarks/gain_cost.py fashion.qdm --save
"""

import dataclasses
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from lib.apart import Apart, opened_stepper, timed_apart, turn_medians
from lib.bench import CPU_SESSIONS, finish, parser, save_form
from scipy import stats

from qdm_deploy.artifacts.bundle import Bundle
from qdm_deploy.artifacts.plan import QuantizationPlan
from qdm_deploy.building.bundle_from_checkpoint import EMBEDDED_MODEL
from qdm_deploy.runtime.random_inputs import random_inputs
from qdm_export.float_graph import export_float_graph
from qdm_export.targets import emit
from qdm_export.unet import load_checkpoint


def main() -> None:
    arguments = parser("What step gains cost on CPUs.")
    arguments.add_argument("bundle", type=Path, help="a bundle of the embedded model")
    arguments.add_argument("--batches", default="4,16")
    arguments.add_argument("--runs", type=int, default=200)
    given = arguments.parse_args()
    plan = QuantizationPlan.load(Bundle.open(given.bundle).file("unet/plan.json").parent)
    static = dataclasses.replace(plan, layers=tuple(dataclasses.replace(item, inverse_r=None) for item in plan.layers))
    checkpoint = load_checkpoint(EMBEDDED_MODEL)
    graph = export_float_graph(checkpoint)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        opened: dict[tuple[str, str], Apart] = {}
        for target, session in CPU_SESSIONS.items():
            for name, form in (("gains", plan), ("static", static)):
                path = save_form(emit(graph, form, target).model, Path(scratch) / f"{target}-{name}", target)
                made = partial(session, path, mode="throughput")
                opened[target, name] = stack.enter_context(Apart(partial(opened_stepper, made)))
        for batch in map(int, given.batches.split(",")):
            times = timed_apart(opened, random_inputs(checkpoint.spec, batch), runs=given.runs, seconds=400)
            for target in CPU_SESSIONS:
                gains, static = (turn_medians(times[target, name]) for name in ("gains", "static"))
                ratios = gains / static
                interval = stats.bootstrap((ratios,), np.median, method="percentile", rng=0).confidence_interval
                rows.append(
                    {
                        "target": target,
                        "batch": batch,
                        "with gains ms": float(np.median(gains)),
                        "static ms": float(np.median(static)),
                        "cost %": 100 * (float(np.median(ratios)) - 1),
                        "low %": 100 * (float(interval.low) - 1),
                        "high %": 100 * (float(interval.high) - 1),
                    }
                )
    extra = {"layers_with_gains": plan.summary()["step_gains"], "bundle": str(given.bundle.name), "runs": given.runs}
    columns = ["target", "batch", "with gains ms", "static ms", "cost %", "low %", "high %"]
    finish("gain-cost", columns, rows, extra, save=given.save)


if __name__ == "__main__":
    main()
