"""What TensorRT-RTX compiles for the embedded model, per GPU generation and without a GPU, with and without z, k and r.

python benchmarks/engine_audit.py --save
"""

import tempfile
from pathlib import Path
from typing import Any

from bench import case, finish, parser, say, write_graph

from qdm_deploy.pipeline.engine import audit_row

# What each plan asks of `build`; what it does not name has build's default.
PLANS: dict[str, dict[str, Any]] = {
    "default": {},
    "every layer INT8": {"keep_fp": "none"},
    "every layer INT8, no k": {"keep_fp": "none", "channel_scales": "none", "concat_scales": "none"},
    "every layer INT8, no z, k": {
        "keep_fp": "none", "channel_scales": "none", "concat_scales": "none", "zero_offset": False,
    },
}  # fmt: skip


def main() -> None:
    arguments = parser("Audit of TensorRT-RTX engines of the embedded model.")
    arguments.add_argument("--sm", default="8.0,8.6,8.9,12.0")
    given = arguments.parse_args()
    model = case("fashion", samples=4)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, options in PLANS.items():
            plan = model.built(**options)
            graph = write_graph(model, plan, "tensorrt", Path(scratch) / name.replace(" ", "_"))
            for sm in given.sm.split(","):
                say(f"{name}, SM {sm}")
                row, _ = audit_row(graph, plan, backend="tensorrt-rtx", sm=sm)
                rows.append({"plan": name, "sm": sm, "planned": row.planned, "int8": row.int8, **row.kernels})
    columns = list(dict.fromkeys(key for row in rows for key in row))
    finish("engine-audit", columns, rows, {}, save=given.save)


if __name__ == "__main__":
    main()
