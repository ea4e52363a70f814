"""Projections of the time embedding as a table: the same numbers, and only where the timestep alone decides them."""

from collections import Counter
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from qdm_deploy.artifacts.plan import Target
from qdm_export.metadata import CENTRED_KEY, TIME_TABLE_KEY
from qdm_export.passes import time_projections
from qdm_export.passes.bfloat16_attention import Bfloat16Attention
from qdm_export.passes.centred_projections import CentredProjections
from qdm_export.passes.instance_norm import InstanceNormForm
from qdm_export.passes.moments_norm import MomentsNormForm
from qdm_export.passes.time_projections import TimeProjections
from qdm_export.targets import FORMS, emit

Array = NDArray[Any]
T, D, C, GROUPS = 40, 32, 8, 2


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def embedding_of(graph: Any, rng: np.random.Generator, timesteps: int = T) -> ir.Value:
    rows = graph.constant("time_table", rng.normal(size=(timesteps, D)).astype(np.float32))
    looked_up = graph.node("Gather", [rows, graph.t], [D], axis=0)
    looked_up.producer().metadata_props[TIME_TABLE_KEY] = str(timesteps)
    return looked_up


def projection(
    graph: Any, rng: np.random.Generator, name: str, data: ir.Value, *, transposed: bool = False
) -> ir.Value:
    weight = rng.normal(size=(D, C) if transposed else (C, D)).astype(np.float32)
    operands = [
        graph.constant(f"{name}.weight", weight),
        graph.constant(f"{name}.bias", rng.normal(size=C).astype(np.float32)),
    ]
    graph.x.name = "sample"
    return graph.node("Gemm", [data, *operands], [C], module=name, transB=0 if transposed else 1)


def block(graph: Any, data: ir.Value, shift: ir.Value, *, read_elsewhere: bool = False) -> ir.Value:
    """What a residual block does with its projection: added to every position, then a group norm."""
    at = len(graph.graph)
    ones, zeros = (
        graph.constant(f"{name}{at}", np.full(C, value, np.float32)) for name, value in (("scale", 1), ("bias", 0))
    )
    wide = graph.node("Unsqueeze", [shift, graph.constant(f"last{at}", np.array([2, 3]))], [C, 1, 1])
    total = graph.node("Add", [data, wide], [C, 6, 5])
    norm = graph.node("GroupNormalization", [total, ones, zeros], [C, 6, 5], num_groups=GROUPS, epsilon=1e-5)
    return graph.node("Add", [norm, total], [C, 6, 5]) if read_elsewhere else norm


def feeds(timesteps: int = T) -> dict[str, Array]:
    x = np.random.default_rng(8).normal(size=(3, C, 6, 5)).astype(np.float32)
    label = np.random.default_rng(9).normal(size=(3, D)).astype(np.float32)
    return {"sample": x, "timestep": np.array([0, timesteps // 2, timesteps - 1]), "label": label}


def same_after(graph: Any, run_graph: Any, form: Any) -> None:
    """The pass, and a norm's form behind it, change no number; a second run of the pass changes nothing."""
    (expected,) = run_graph(graph.model, feeds(), optimize=False).values()
    for step in (CentredProjections(), TimeProjections()):
        step(graph.model)
        assert not step(graph.model).modified
    if form is not None:
        assert form()(graph.model).modified
    (result,) = run_graph(graph.model, feeds(), optimize=False).values()
    np.testing.assert_allclose(result, expected, atol=2e-5)


@pytest.mark.parametrize("form", [None, InstanceNormForm, MomentsNormForm])
@pytest.mark.parametrize("read_elsewhere", [False, True])
def test_products_become_one_lookup_and_nothing_changes(
    small: Any, run_graph: Any, form: Any, read_elsewhere: bool
) -> None:
    rng = np.random.default_rng(0)
    graph = small((C, 6, 5))
    embedding = embedding_of(graph, rng)
    first, second = (projection(graph, rng, f"p{i}", embedding, transposed=bool(i)) for i in range(2))
    graph.output(block(graph, block(graph, graph.x, first), second, read_elsewhere=read_elsewhere))
    same_after(graph, run_graph, form)
    found = operators(graph.model)
    assert (found["Gemm"], found["Gather"], found["Split"]) == (0, 1, 1)


def labelled(graph: Any, rng: np.random.Generator) -> ir.Value:
    """An embedding that does not depend on the timestep alone."""
    label = ir.Value(name="label", shape=ir.Shape(["batch", D]), type=ir.TensorType(ir.DataType.FLOAT))
    graph.graph.inputs.append(label)
    return graph.node("Add", [embedding_of(graph, rng), label], [D])


@pytest.mark.parametrize("form", [None, InstanceNormForm, MomentsNormForm])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_product_that_stays_is_centred_by_its_weights(
    small: Any, run_graph: Any, form: Any, transposed: bool
) -> None:
    rng = np.random.default_rng(0)
    graph = small((C, 6, 5))
    graph.output(block(graph, graph.x, projection(graph, rng, "p", labelled(graph, rng), transposed=transposed)))
    same_after(graph, run_graph, form)
    weight = graph.model.graph.initializers["p.weight/centred"].const_value.numpy()
    by_channel = weight.T if transposed else weight
    assert np.abs(by_channel.reshape(GROUPS, -1, D).mean(axis=1)).max() < 1e-6


@pytest.mark.parametrize("read_elsewhere", [False, True])
def test_only_what_a_norm_alone_reads_is_centred(small: Any, read_elsewhere: bool) -> None:
    rng = np.random.default_rng(0)
    graph = small((C, 6, 5))
    shift = projection(graph, rng, "p", embedding_of(graph, rng))
    graph.output(block(graph, graph.x, shift, read_elsewhere=read_elsewhere))
    CentredProjections()(graph.model)
    TimeProjections()(graph.model)
    (split,) = [node for node in graph.model.graph if node.op_type == "Split"]
    assert split.outputs[0].metadata_props.get(CENTRED_KEY) == (None if read_elsewhere else str(GROUPS))
    table = graph.model.graph.initializers["time_projection_table"].const_value.numpy()
    means = np.abs(table.reshape(T, GROUPS, -1).mean(axis=2)).max()
    assert means > 0.1 if read_elsewhere else means < 1e-6
    # The norm in the form of its moments then takes the mean of its input alone: nothing is added to it before.
    MomentsNormForm()(graph.model)
    (mean,) = [node for node in graph.model.graph if str(node.name).endswith("/group_mean")]
    assert mean.inputs[0].producer().op_type == "Reshape"


def test_a_table_much_larger_than_the_weights_is_not_made(small: Any) -> None:
    rng = np.random.default_rng(0)
    graph = small((C, 6, 5))
    graph.output(block(graph, graph.x, projection(graph, rng, "p", embedding_of(graph, rng, timesteps=2 * D + 1))))
    result = TimeProjections()(graph.model)
    assert list(result.found.left.values()) == [f"a table of {2 * D + 1} timesteps is too large for {D} channels"]
    assert operators(graph.model)["Gemm"] == 1


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_a_whole_step_says_the_same(
    tiny: Any, emitted: Any, run_graph: Any, monkeypatch: pytest.MonkeyPatch, target: Target
) -> None:
    whole, plan = tiny.float_graph("rgb"), tiny.plan("rgb")
    form = FORMS[target].without(Bfloat16Attention) if target == "openvino" else FORMS[target]
    monkeypatch.setattr(time_projections, "_LARGEST", 100)  # the tiny model's embedding is narrow
    forms = (form, form.without(CentredProjections, TimeProjections))
    table, product = (emit(whole, plan, target, form=each).model for each in forms)
    assert operators(product)["Gemm"] > operators(table)["Gemm"]
    given = emitted.feeds("rgb", 3)
    for found, expected in zip(
        *(run_graph(model, given, optimize=False).values() for model in (table, product)), strict=True
    ):
        error = np.square(found - expected).sum() / np.square(expected).sum()
        assert 10 * np.log10(error) < -45  # codes next to a boundary may round the other way
