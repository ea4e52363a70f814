"""What TensorRT-RTX compiles for the embedded model, per GPU generation and without a GPU.

python benchmarks/engine_audit.py --save                                 plans with and without z, k and r
python benchmarks/engine_audit.py --bundle fashion.qdm --sm 8.9 --save   forms of one plan's graph, and of no plan

Each row is one engine. "float16" has no layer quantized: what the U-Net costs in kernels without INT8.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench import case, finish, parser, save_form, say, write_graph
from gpu_graphs import forms_of_plan

from qdm_deploy.artifacts.bundle import Bundle
from qdm_deploy.artifacts.plan import QuantizationPlan
from qdm_deploy.build.bundle_from_checkpoint import EMBEDDED_MODEL
from qdm_deploy.build.engine_audit import audit_row
from qdm_export.float_graph import export_float_graph
from qdm_export.unet import load_checkpoint

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
    arguments.add_argument("--bundle", type=Path, help="a bundle of the embedded model, instead of new plans")
    given = arguments.parse_args()
    rows: list[dict[str, Any]] = []
    extra: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        found = _new_plans(Path(scratch)) if given.bundle is None else _forms(given.bundle, Path(scratch))
        for name, graph, plan in found:
            for sm in given.sm.split(","):
                say(f"{name}, SM {sm}")
                row, engine = audit_row(graph, plan, backend="tensorrt-rtx", sm=sm)
                rows.append({"plan": name, "sm": sm, "planned": row.planned, "int8": row.int8, **row.kernels})
                extra[f"kernels per block: {name}, SM {sm}"] = engine.audit.kernels_per_block()
    columns = list(dict.fromkeys(key for row in rows for key in row))
    finish("engine-audit" if given.bundle is None else "engine-forms", columns, rows, extra, save=given.save)


def _new_plans(scratch: Path) -> Iterator[tuple[str, Path, QuantizationPlan]]:
    model = case("fashion", samples=4)
    for name, options in PLANS.items():
        plan = model.built(**options)
        yield name, write_graph(model, plan, "tensorrt", scratch / name.replace(" ", "_")), plan


def _forms(bundle: Path, scratch: Path) -> Iterator[tuple[str, Path, QuantizationPlan]]:
    plan = QuantizationPlan.load(Bundle.open(bundle).file("unet/plan.json").parent)
    graph = export_float_graph(load_checkpoint(EMBEDDED_MODEL))
    for name, (form, planned) in forms_of_plan(graph, plan).items():
        yield name, save_form(form, scratch / name.replace(" ", "_")), planned


if __name__ == "__main__":
    main()
