"""What each factor of the plan is worth, on the embedded model: every feature on and off, on every target.

`onnxruntime` and `openvino` run their own graphs; `tensorrt` runs the simulation of its integers. Teacher-forced SQNR
of the network's output (mean over the steps, and at the last step), PSNR of the finished images, unseen seeds; medians
over the calibration seeds, and their spread.

    python benchmarks/ablation.py --cache DIR --save zen5
    python benchmarks/ablation.py --rows "symmetric min-max;+ output correction" --save zen5-headline
    python benchmarks/ablation.py --rows "symmetric min-max" --only openvino --calibration-seeds 0 --seeds 2 --steps 3
"""

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lab.laboratory import EPS, LAST, PSNR, Laboratory
from lab.runner import run
from lib.case import PLAIN, session_for

from qdm_deploy.artifacts.plan import TARGETS, Target
from qdm_deploy.building.quality import compare_with

# What came before the last step to the default.
_BEFORE: dict[str, Any] = {"output_correction": "none"}
_STATIC: dict[str, Any] = {"step_bins": 1, "keep_fp": "none", **_BEFORE}
# What each row asks of `build`; what it does not name has build's default.
VARIANTS: dict[str, dict[str, Any]] = {
    "symmetric min-max": PLAIN,
    "symmetric, Lp 2.4 range": {**PLAIN, "ranges": "lp"},
    "+ zero offset z": {"concat_scales": "none", "channel_scales": "none", **_STATIC},
    "+ free factors k": _STATIC,
    "+ few layers in float": _BEFORE,
    "+ output correction (default)": {},
    "default without z": {"zero_offset": False},
    "default without k": {"concat_scales": "none", "channel_scales": "none"},
    "default, only branch factors": {"channel_scales": "none"},
    "default, k on every input": {"channel_scales": "auto"},
    "default, 4 step bins": {"step_bins": 4},
    "default, min-max range": {"ranges": "minmax"},
    "default, MSE range": {"ranges": "mse"},
    "default, 10 % of the cost in float": {"keep_fp": "10%"},
    "default, upsampling whole": {"upsample_phases": False},
}


def measured(name: str, target: Target, lab: Laboratory) -> dict[str, float]:
    """One plan on one target."""
    model = lab.model
    plan = lab.shared(f"built {name}", lambda: lab.case().built(**VARIANTS[name]))
    with TemporaryDirectory() as folder, session_for(lab.case(), plan, target, Path(folder)) as session:
        row, _ = compare_with(
            model.reference, session, shown=model.reference.states[-1], decoder=None, target=target, backend=target
        )
    counts = {
        key: float(plan.summary()[count])
        for key, count in (("float", "float"), ("z", "zero_offset"), ("k", "branch_factors"), ("r", "step_gains"))
    }
    return {
        EPS: row.eps_sqnr_mean_db,
        LAST: row.eps_sqnr_db[-1],
        PSNR: row.psnr_mean_db,
        "worst PSNR": row.psnr_min_db,
        **counts,
    }


if __name__ == "__main__":
    tables = {target: {name: partial(measured, name, target) for name in VARIANTS} for target in TARGETS}
    run("ablation", __doc__, tables)
