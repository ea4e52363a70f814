"""What the openvino target gains by attention between very many positions in bfloat16.

Reads the graphs that `carried_latency.py prepare` wrote: the float graph and the openvino graph of one model, which is
timed with its large attention in float32 and in bfloat16, in turn. `x0 SQNR dB` is that of the denoised sample against
the float graph, on random inputs.

    python benchmarks/carried_latency.py prepare FOLDER --models sd15 --only "openvino INT8, throughput"
    python benchmarks/attention_forms.py FOLDER/sd15 --save
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from apart import Apart, opened_stepper, timed_apart
from bench import finish, parser, say

from qdm_deploy.artifacts.model_spec import ModelSpec
from qdm_deploy.runtime import OnnxRuntimeSession, OpenVinoSession
from qdm_deploy.runtime.random_inputs import random_inputs
from qdm_export.passes.bfloat16_attention import LEAST_SCORES, Bfloat16Attention


def main() -> None:
    arguments = parser("Large attention on OpenVINO.")
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("--batch", type=int, default=1)
    arguments.add_argument("--runs", type=int, default=9)
    given = arguments.parse_args()
    spec = ModelSpec.model_validate(json.loads((given.folder / "contenders.json").read_text())["spec"])
    source = given.folder / "openvino-auto" / "openvino.onnx"
    inputs = random_inputs(spec, given.batch)
    with OnnxRuntimeSession(given.folder / "float" / "float.onnx") as session:
        expected = session.run({name: inputs[name] for name in session.input_names}).x0.astype(np.float64)
    graphs: dict[str, Path] = {}
    quality: dict[str, float] = {}
    for form, least in {"float32": 1 << 60, "bfloat16": LEAST_SCORES}.items():
        model = ir.load(source)
        modified = Bfloat16Attention(least)(model).modified
        if modified == (form == "float32"):
            raise SystemExit(f"{source} has no large attention, or has it in bfloat16 already")
        graphs[form] = source.with_name(f"attention-{form}.onnx")
        ir.save(model, graphs[form])
        with OpenVinoSession(graphs[form]) as session:
            found = session.run({name: inputs[name] for name in session.input_names}).x0.astype(np.float64)
        quality[form] = float(10 * np.log10((expected**2).sum() / ((found - expected) ** 2).sum()))
        say(f"{form}: {quality[form]:.2f} dB")
    opened = {form: Apart(partial(opened_stepper, partial(OpenVinoSession, graph))) for form, graph in graphs.items()}
    with opened["float32"], opened["bfloat16"]:
        times = timed_apart(opened, inputs, runs=given.runs, seconds=200)
    rows: list[dict[str, Any]] = [
        {
            "model": given.folder.name,
            "batch": given.batch,
            "attention": form,
            "median ms": float(np.median(values)),
            "least ms": float(np.min(values)),
            "faster": float(np.median(times["float32"]) / np.median(values)),
            "x0 SQNR dB": quality[form],
        }
        for form, values in times.items()
    ]
    finish("attention-forms", list(rows[0]), rows, {"runs": given.runs}, save=given.save)


if __name__ == "__main__":
    main()
