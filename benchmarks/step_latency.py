"""Milliseconds per denoising step: ours beside what a user would run instead, each in its own process, in turn.

`faster` is against ONNX Runtime in FP32. Ratios within one run are the point; times move with the machine.
`eps SQNR dB` is teacher-forced against the float model, on a few unseen seeds.

    python benchmarks/step_latency.py --save zen5
    pip install nncf; python benchmarks/step_latency.py --models cifar10       # with NNCF's post-training INT8 too
    python benchmarks/step_latency.py --models ldm4 --batches 1,4 --only "openvino INT8"      # 24 GiB hold a few

On a machine that cannot make the graphs, time those made elsewhere:

    python benchmarks/step_latency.py --models cifar10 --prepare FOLDER --light
    python benchmarks/step_latency.py --time FOLDER --save amx
"""

from functools import cache, partial
from pathlib import Path
from typing import Any

from lib.case import Case, write_exported, write_float, write_graph
from lib.contest import Contender, contest, contest_parser
from lib.peers import peers
from lib.sessions import Opening

from qdm_deploy.artifacts.plan import QuantizationPlan, Target


def contenders(model: Case, folder: Path) -> dict[str, Contender]:
    """Everything that is timed for one model; the baseline first, and what takes most memory last."""

    @cache
    def exported() -> Path:
        return write_exported(model, folder / "exported")

    # Planned when it is first asked for: a run of few contenders need not wait for the plans of others.
    @cache
    def plan(step_bins: int | str) -> QuantizationPlan:
        return model.built(step_bins=step_bins)

    @cache
    def ours(target: Target, step_bins: int | str) -> Path:
        return write_graph(model, plan(step_bins), target, folder / f"{target}-{step_bins}")

    def int8(target: Target, bins: int | str = "auto", **options: Any) -> Contender:
        return Contender(lambda: Opening(target, ours(target, bins), options))

    def peer(kind: str, **options: Any) -> Contender:
        return Contender(lambda: Opening(kind, exported(), options))

    float_graph = partial(write_float, model, folder / "float")
    found = {
        "onnxruntime FP32": Contender(lambda: Opening("onnxruntime", float_graph(), {})),
        "onnxruntime FP32, as exported": peer("onnxruntime"),
        "openvino FP32": peer("openvino", precision="f32"),
        "openvino BF16": peer("openvino, hinted"),
        "openvino BF16, throughput": peer("openvino, hinted", mode="throughput"),
    }
    for target in ("onnxruntime", "openvino"):
        found[f"{target} INT8"] = int8(target)
        found[f"{target} INT8, 4 step bins"] = int8(target, 4)
        found[f"{target} INT8, throughput"] = int8(target, mode="throughput")
    found["openvino INT8, bf16 rest"] = int8("openvino", precision="bf16")
    return found | peers(model, folder)


if __name__ == "__main__":
    contest("step-latency", contest_parser(__doc__, models="fashion,cifar10", runs=15).parse_args(), contenders)
