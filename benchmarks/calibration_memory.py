"""Peak memory of calibration against the number of samples: each count in a process of its own.

python benchmarks/calibration_memory.py --save
"""

import json
import resource
import subprocess
import sys
from typing import Any

from bench import finish, parser, say


def peak(samples: int, steps: int) -> dict[str, Any]:
    """Sample and measure in this process; report its peak resident memory."""
    from bench import case

    model = case("fashion", samples=samples, steps=steps)
    rows = sum(int(model.statistics.inputs[name].counts.sum() > 0) for name in model.statistics.inputs)
    return {"samples": samples, "tensors": rows, "peak MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def main() -> None:
    arguments = parser("Peak memory of calibration at different numbers of samples.")
    arguments.add_argument("--samples", default="16,256")
    arguments.add_argument("--steps", type=int, default=5)
    arguments.add_argument("--one", type=int, help="measure this count in this process")
    given = arguments.parse_args()
    if given.one is not None:
        print(json.dumps(peak(given.one, given.steps)))
        return
    rows = []
    for samples in given.samples.split(","):
        say(f"{samples} samples")
        done = subprocess.run(
            [sys.executable, __file__, "--one", samples, "--steps", str(given.steps)],
            capture_output=True,
            text=True,
            check=True,
        )
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    for row in rows:
        row["over first"] = row["peak MiB"] / rows[0]["peak MiB"]
    finish(
        "calibration-memory",
        ["samples", "tensors", "peak MiB", "over first"],
        rows,
        {"steps": given.steps},
        save=given.save,
    )


if __name__ == "__main__":
    main()
