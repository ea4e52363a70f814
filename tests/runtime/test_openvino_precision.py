"""A bfloat16 rest on OpenVINO: which operations stay float32, and what that is worth."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qdm_deploy.artifacts.plan import LayerPlan
from qdm_deploy.backends.openvino.graph import compile_graph, import_openvino, multiplies_bfloat16, read_graph
from qdm_deploy.backends.openvino.precision import choose_precision, keep_float32
from qdm_deploy.backends.openvino.session import OpenVinoSession
from qdm_deploy.metrics.error import sqnr_db
from qdm_deploy.runtime.cpu import cpu_flags
from qdm_deploy.samplers.random_inputs import random_inputs
from qdm_export.passes.bfloat16_kernels import Bfloat16Kernels
from qdm_export.targets import FORMS, emit

bfloat16 = pytest.mark.skipif(
    not multiplies_bfloat16(cpu_flags()),
    reason="this CPU has no instructions for bfloat16; would have shown what a bfloat16 rest is worth",
)


def test_precision_is_chosen_for_the_cpu() -> None:
    amx = frozenset({"amx_bf16", "avx512_bf16"})
    assert choose_precision("auto", amx) == ("bf16", "this CPU multiplies bf16 matrices (AMX)")
    assert choose_precision("auto", frozenset({"avx512_bf16"}))[0] == "f32"
    assert choose_precision("bf16", frozenset()) == ("bf16", "asked for")
    assert choose_precision("f32", amx) == ("f32", "asked for")


def compiled(graph: Path, inputs: Mapping[str, Any], precision: str, *, keep: bool) -> Any:
    model = read_graph(graph, cpu_flags())
    if keep:
        assert keep_float32(model) > 0
    model.reshape({item.any_name: list(inputs[item.any_name].shape) for item in model.inputs})
    options = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": 1, "PERF_COUNT": True}
    request = compile_graph(import_openvino().Core(), model, options).create_infer_request()
    request.infer({item.any_name: inputs[item.any_name] for item in model.inputs})
    return request


@bfloat16
@pytest.mark.parametrize("name", ["labels", "rgb", "text", "variance"])
def test_the_ends_and_the_statistics_of_norms_are_most_of_the_loss(tiny: Any, tmp_path: Path, name: str) -> None:
    # Nothing in INT8: in a tiny model single codes that round the other way hide what is asked here.
    plan = tiny.plan(name)
    floating = replace(plan, layers=tuple(LayerPlan(item.layer, "float", "a float graph") for item in plan.layers))
    form = FORMS["openvino"].without(Bfloat16Kernels)
    graph = tmp_path / "graph.onnx"
    ir.save(emit(tiny.float_graph(name), floating, "openvino", form=form).model, graph)
    inputs = random_inputs(tiny.checkpoint(name).denoiser, 16)
    inputs["timestep"][:] = 0  # where the sample has to be known best
    exact, rounded, kept = (
        compiled(graph, inputs, precision, keep=keep)
        for precision, keep in (("f32", False), ("bf16", False), ("bf16", True))
    )
    noise = {
        label: sqnr_db(exact.get_tensor("x0").data, request.get_tensor("x0").data)
        for label, request in (("rounded", rounded), ("kept", kept))
    }
    assert noise["kept"] > noise["rounded"] + 1
    assert sum("bf16" in item.exec_type for item in kept.profiling_info) > 10  # the tensors between the ends
    convolutions = [item.exec_type for item in kept.profiling_info if item.node_type == "Convolution"]
    assert convolutions[0].endswith("_f32")
    assert convolutions[-1].endswith("_f32")
    # Neither the values of channels nor the ends are handed over by kernels of their own.
    assert sum(item.node_type == "Reorder" for item in kept.profiling_info) < sum(
        item.node_type == "Reorder" for item in rounded.profiling_info
    )


@bfloat16
def test_a_computed_time_embedding_tells_neighbours_apart(arithmetic: Any) -> None:
    """Where the timestep becomes a number in the graph, 8 bits would make one of 96 to 99."""
    timesteps = np.arange(94, 100)
    shape = (len(timesteps), *arithmetic.spec.sample_shape)
    inputs = random_inputs(arithmetic.spec.denoiser, len(timesteps))
    inputs |= {"timestep": timesteps, "sample": np.zeros(shape, np.float32)}
    found = {}
    for precision in ("f32", "bf16"):
        with OpenVinoSession(arithmetic.graph, precision=precision) as session:
            found[precision] = session.run(inputs).x0.copy()
    np.testing.assert_allclose(found["bf16"], found["f32"], atol=1e-6)
    assert len(np.unique(found["bf16"][:, 0, 0, 0])) == len(timesteps)


@pytest.mark.parametrize(("precision", "expected"), [("f32", True), ("bf16", False)])
def test_casts_of_the_graph_are_gone_where_everything_is_bfloat16(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Any, expected: bool
) -> None:
    monkeypatch.setattr("qdm_deploy.backends.openvino.session.cpu_flags", lambda: frozenset({"avx512_bf16"}))
    plan = tiny.plan("labels")
    kept = replace(plan, layers=tuple(LayerPlan(item.layer, "float", "kept") for item in plan.layers))
    graph = tmp_path / "graph.onnx"
    ir.save(emit(tiny.float_graph("labels"), kept, "openvino").model, graph)
    with OpenVinoSession(graph, precision=precision) as session:
        names = [node.get_friendly_name() for node in session._model.get_ops()]
        found = [name for name in names if name.endswith("/bfloat16")]
    assert bool(found) == expected


def test_compiled_graphs_with_other_marks_are_other_graphs(plain: Any) -> None:
    with OpenVinoSession(plain.graph, precision="bf16") as half, OpenVinoSession(plain.graph, precision="f32") as whole:
        ours, theirs = (session._compiled_identity("graph") for session in (half, whole))
    assert theirs["kept in float32"] == 0
    assert ours["kept in float32"] != 0
