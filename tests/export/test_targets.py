"""Emitted graphs: valid, integer where the plan says so, with the same codes, each layer equal to the simulation."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from qdm_calibration.simulate import quantized_layer
from qdm_deploy.artifacts.phase_sums import fits_phases, upsampled
from qdm_deploy.artifacts.plan import TARGETS, QuantizationPlan
from qdm_deploy.errors import ExportError, InputError
from qdm_export.check import (
    INTEGER_OPERATORS,
    bytes_per_row,
    check_onnx,
    integer_kernels,
    layer_endpoints,
    with_outputs,
)
from qdm_export.passes.bfloat16_kernels import Bfloat16Kernels
from qdm_export.passes.rational_silu import RationalSilu
from qdm_export.passes.upsample_phases import UpsamplePhases
from qdm_export.shared_weights import save_with_shared_weights
from qdm_export.targets import FORMS, emit
from qdm_export.topology import layer_nodes

NAMES = ("labels", "rgb", "text", "variance")


def sqnr_db(reference: Any, value: Any) -> float:
    noise = ((reference.astype(np.float64) - value) ** 2).sum()
    return float(10 * np.log10((reference.astype(np.float64) ** 2).sum() / max(noise, 1e-30)))


@pytest.mark.parametrize("name", NAMES)
def test_every_target_is_a_valid_onnx_graph_that_runs(
    emitted: Any, run_graph: Any, tiny: Any, tmp_path: Path, name: str
) -> None:
    graphs = {tmp_path / f"{target}.onnx": emitted.graph(name, target).clone() for target in TARGETS}
    save_with_shared_weights(graphs.items(), tmp_path / "weights.bin")
    feeds = emitted.feeds(name, 3)
    expected = run_graph(tiny.float_graph(name), feeds)
    for path in graphs:
        check_onnx(path)
        result = run_graph(path, feeds)
        assert result.keys() == {"next_sample", "x0", "next_history"}
        for key, value in result.items():
            assert value.dtype == np.float32
            assert 12 < sqnr_db(expected[key], value) < 90, (path.name, key)


def test_targets_have_the_interface_of_the_float_graph(emitted: Any, tiny: Any) -> None:
    def interface(model: ir.Model) -> Any:
        return [(v.name, v.dtype, str(v.shape)) for v in (*model.graph.inputs, *model.graph.outputs)]

    expected = interface(tiny.float_graph("labels"))
    assert [name for name, _, _ in expected][:5] == ["sample", "timestep", "coefficients", "noise", "history"]
    for target in TARGETS:
        assert interface(emitted.graph("labels", target)) == expected


def test_emitting_leaves_the_float_graph_alone(emitted: Any, tiny: Any) -> None:
    def fingerprint() -> Any:
        graph = tiny.float_graph("rgb").graph
        return [(n.op_type, n.name, [v and v.name for v in n.inputs]) for n in graph], list(graph.initializers)

    before = fingerprint()
    for target in TARGETS:
        emit(tiny.float_graph("rgb"), tiny.plan("rgb"), target)
    assert fingerprint() == before


def initializers(model: ir.Model, suffix: str) -> dict[str, Any]:
    found = model.graph.initializers.items()
    return {name.removesuffix(suffix): v.const_value.numpy() for name, v in found if name.endswith(suffix)}  # type: ignore[union-attr]


@pytest.mark.parametrize("name", NAMES)
def test_weight_codes_are_the_plans_in_every_target(emitted: Any, tiny: Any, name: str) -> None:
    plan = tiny.plan(name).quantized
    phased = {layer.name for layer in plan if fits_phases(layer)}
    for target in TARGETS:
        codes = initializers(emitted.graph(name, target), "/weight_codes")
        parts = {layer for layer in codes if "/phase_" in layer}
        assert parts == (
            {f"{layer}/phase_{n}" for layer in phased for n in range(4)}
            if UpsamplePhases in FORMS[target].passes
            else set()
        )
        codes = {layer: values for layer, values in codes.items() if layer not in parts}
        planned = {layer.name: layer.codes for layer in plan if not parts or layer.name not in phased}
        assert codes.keys() == planned.keys()
        for layer, values in codes.items():
            assert values.dtype == np.int8
            expected = planned[layer]
            fits = np.array_equal(values, expected)
            assert fits or np.array_equal(values, expected.T)


@pytest.mark.parametrize("name", ["labels", "text"])
def test_shared_inputs_are_quantized_once_or_once_per_reader(emitted: Any, tiny: Any, name: str) -> None:
    groups = tiny.topology(name).groups()
    for target in TARGETS:
        quantizers = Counter(
            node.name.rpartition("/")[0] for node in emitted.graph(name, target).graph
            if node.op_type == "QuantizeLinear" and node.name.endswith("/quantize")
        )  # fmt: skip
        readers = [layer.name for layers in groups.values() for layer in layers]
        assert quantizers == Counter(readers if FORMS[target].unsigned else list(groups))
    for node in emitted.graph(name, "onnxruntime").graph:
        if node.op_type == "QuantizeLinear":
            assert len(list(node.outputs[0].uses())) == 1


def test_codes_and_zero_points_have_the_types_of_the_target(emitted: Any, tiny: Any) -> None:
    for target in TARGETS:
        model, form = emitted.graph("labels", target), FORMS[target]
        for node in model.graph:
            if node.op_type != "QuantizeLinear":
                continue
            zero = node.inputs[2].const_value.numpy()
            scale = node.inputs[1]
            assert zero.dtype == (np.uint8 if form.unsigned else np.int8)
            assert form.unsigned or zero == 0
            assert scale.dtype == (ir.DataType.FLOAT16 if form.half else ir.DataType.FLOAT)
        for layer in tiny.plan("labels").quantized:
            scale = initializers(model, "/scale/float16" if form.half else "/scale")[layer.layer.input_group]
            assert scale == np.float32(layer.scale)  # exact in float16 too


@pytest.mark.parametrize("name", NAMES)
def test_onnxruntime_runs_every_planned_layer_on_integers(
    emitted: Any, tiny: Any, open_session: Any, tmp_path: Path, name: str
) -> None:
    path = tmp_path / "optimized.onnx"
    open_session(emitted.graph(name, "onnxruntime"), optimized=path)
    kinds = Counter(layer.layer.kind for layer in tiny.plan(name).quantized)
    found = integer_kernels(path)
    assert found["QLinearConv"] == kinds["conv"] + 3 * sum(map(fits_phases, tiny.plan(name).quantized))
    assert sum(found[op] for op in INTEGER_OPERATORS if op != "QLinearConv") == kinds["linear"]
    left = Counter(node.op_type for node in onnx.load(path).graph.node)
    assert left["ConvInteger"] == left["DynamicQuantizeLinear"] == 0
    floats = len(tiny.plan(name).layers) - len(tiny.plan(name).quantized)
    assert left["Conv"] + left["Gemm"] + left["FusedConv"] + left["FusedGemm"] <= floats


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("name", NAMES)
def test_every_layer_computes_what_the_simulation_computes(
    emitted: Any, tiny: Any, run_graph: Any, name: str, target: Any
) -> None:
    plan, network = tiny.plan(name), tiny.checkpoint(name).unet
    graph = emitted.graph(name, target)
    endpoints = layer_endpoints(graph, plan)
    feeds = emitted.feeds(name, 4, seed=7)
    feeds["timestep"] = np.array([5, 400, 700, 990], feeds["timestep"].dtype)
    values = run_graph(with_outputs(graph, [n for e in endpoints for n in (e.data, e.result)]), feeds)
    bins = torch.from_numpy(plan.bin_of_timestep()[feeds["timestep"].astype(np.int64)])
    for item in endpoints:
        entry = plan.layer(item.name)
        layer = quantized_layer(network.get_submodule(f"unet.{item.name}"), entry, target, dtype=torch.float64)
        layer.time_bin = bins
        with torch.inference_mode():
            expected = layer(torch.from_numpy(upsampled(values[item.data], entry.layer))).numpy()
        found = values[item.result]
        assert found.shape == expected.shape
        if target == "onnxruntime" and entry.output_scale is not None:
            gain = 1 if entry.inverse_r is None else 1 / entry.inverse_r[bins.numpy()].reshape(-1, 1, 1, 1)
            steps = np.abs(found - expected) / (entry.output_scale.reshape(1, -1, 1, 1) * gain)
            assert steps.max() < 1.01, item.name  # a rounding tie may go the other way, by one step of the output
            assert (steps > 0.01).mean() < 2e-3, item.name
        else:
            assert np.abs(found - expected).max() < 2e-5 * np.abs(expected).max(), item.name


@pytest.mark.parametrize("name", ["labels", "text"])
def test_layers_of_the_float16_target_are_close_to_the_simulation(
    emitted: Any, tiny: Any, run_graph: Any, name: str
) -> None:
    plan, network = tiny.plan(name), tiny.checkpoint(name).unet
    graph = emitted.graph(name, "tensorrt")
    endpoints = layer_endpoints(graph, plan)
    feeds = emitted.feeds(name, 4, seed=7)
    values = run_graph(with_outputs(graph, [n for e in endpoints for n in (e.data, e.result)]), feeds)
    bins = torch.from_numpy(plan.bin_of_timestep()[feeds["timestep"].astype(np.int64)])
    for item in endpoints:
        layer = quantized_layer(network.get_submodule(f"unet.{item.name}"), plan.layer(item.name), "tensorrt")
        layer.time_bin = bins
        with torch.inference_mode():
            expected = layer(torch.from_numpy(values[item.data].astype(np.float32))).numpy()
        assert values[item.result].dtype == np.float16
        assert sqnr_db(expected, values[item.result].astype(np.float32)) > 35, item.name


def code_graph(model: ir.Model, data: str, layer: str, dtype: ir.DataType, channels: tuple[Any, ...]) -> ir.Model:
    """From a layer's float input to its activation codes: only what stands between them."""
    model = model.clone()
    values = ir.convenience.create_value_mapping(model.graph)
    source = values[data]
    start = ir.Value(name="x", shape=ir.Shape(channels), type=ir.TensorType(dtype))
    codes = next(node for node in model.graph if node.name == f"{layer}/quantize").outputs[0]
    for use in list(source.uses()):
        use.node.replace_input_with(use.idx, start)
    for value in [value for value in model.graph.inputs if value.name != "timestep"]:
        model.graph.inputs.remove(value)
    model.graph.inputs.append(start)
    model.graph.outputs.clear()
    model.graph.outputs.append(codes)
    from onnx_ir.passes import common

    common.RemoveUnusedNodesPass()(model)
    return model


@pytest.mark.parametrize("name", ["labels", "text"])
def test_u8_and_s8_forms_give_the_same_codes_but_for_ties(emitted: Any, tiny: Any, run_graph: Any, name: str) -> None:
    plan = tiny.plan(name)
    s8 = signed_form(tiny, name)
    u8 = emitted.graph(name, "onnxruntime")
    rng = np.random.default_rng(3)
    timestep = np.array([10, 500, 999])
    ends = [{e.name: e.data for e in layer_endpoints(graph, plan)} for graph in (u8, s8)]
    for group, layers in tiny.topology(name).groups().items():
        entry = plan.layer(group)
        shape = (
            (entry.layer.in_channels, *entry.layer.spatial)
            if entry.layer.kind == "conv"
            else (9, entry.layer.in_channels)
        )
        # A little more than the grid covers in every row.
        steps = rng.uniform(entry.zero_offset - 140, entry.zero_offset + 139, (3, *shape))
        gain = (
            1.0
            if entry.inverse_r is None
            else 1 / entry.inverse_r[plan.bin_of_timestep()[timestep]].reshape(3, *[1] * len(shape))
        )
        x = (steps * entry.scale * gain).astype(np.float32)
        feeds = {"x": x, "timestep": timestep.astype(tiny.checkpoint(name).denoiser.interface["timestep"].numpy_dtype)}
        dims = ("batch", *shape)
        codes = []
        for graph, end in zip((u8, s8), ends, strict=True):
            part = code_graph(graph, end[group], group, ir.DataType.FLOAT, dims)
            (found,) = run_graph(part, feeds, optimize=False).values()
            codes.append(found.astype(int))
        scaled = x.astype(np.float64)
        if entry.inverse_k is not None:
            scaled = scaled * (entry.inverse_k.reshape(-1, 1, 1) if entry.layer.kind == "conv" else entry.inverse_k)
        if entry.inverse_r is not None:
            scaled = scaled * entry.inverse_r[plan.bin_of_timestep()[timestep]].reshape(3, *[1] * (x.ndim - 1))
        steps = scaled / entry.scale
        exact = np.clip(np.rint(steps) - entry.zero_offset, -128, 127)
        tie = np.abs(np.abs(steps - np.floor(steps)) - 0.5) < 1e-3
        assert np.array_equal((codes[0] - 128)[~tie], exact[~tie]), layers[0].name
        assert np.array_equal(codes[1][~tie], exact[~tie]), layers[0].name
        assert np.abs(codes[0] - 128 - codes[1]).max() <= 1
        assert tie.mean() < 0.01
        assert len(np.unique(exact)) > 150


def signed_form(tiny: Any, name: str) -> ir.Model:
    """The signed form in float32: the float16 target before anything rounds to float16."""
    return emit(tiny.float_graph(name), tiny.plan(name), "tensorrt", rest="fp32").model


@pytest.mark.parametrize("name", NAMES)
def test_the_signed_form_computes_what_the_simulation_computes(
    tiny: Any, emitted: Any, run_graph: Any, name: str
) -> None:
    """Zero offsets as subtraction and constant maps, before float16 rounds anything."""
    plan, network = tiny.plan(name), tiny.checkpoint(name).unet
    graph = signed_form(tiny, name)
    endpoints = layer_endpoints(graph, plan)
    feeds = emitted.feeds(name, 3, seed=2)
    values = run_graph(with_outputs(graph, [n for e in endpoints for n in (e.data, e.result)]), feeds, optimize=False)
    bins = torch.from_numpy(plan.bin_of_timestep()[feeds["timestep"].astype(np.int64)])
    for item in endpoints:
        layer = quantized_layer(
            network.get_submodule(f"unet.{item.name}"), plan.layer(item.name), "tensorrt", dtype=torch.float64
        )
        layer.time_bin = bins
        with torch.inference_mode():
            expected = layer(torch.from_numpy(values[item.data])).numpy()
        assert np.abs(values[item.result] - expected).max() < 5e-5 * np.abs(expected).max(), item.name


def test_a_plan_without_int8_layers_is_the_float_graph(tiny: Any, emitted: Any, run_graph: Any) -> None:
    plan = tiny.plan("rgb")
    floats = replace(plan, layers=tuple(replace(item, precision="float", reason="test") for item in plan.layers))
    feeds = emitted.feeds("rgb", 2)
    expected = run_graph(tiny.float_graph("rgb"), feeds)
    for target in ("onnxruntime", "openvino"):
        form = FORMS[target]
        if target == "openvino":
            form = form.without(Bfloat16Kernels, RationalSilu)
        model = emit(tiny.float_graph("rgb"), floats, target, form=form).model
        assert not any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph)
        for key, value in run_graph(model, feeds).items():
            assert sqnr_db(expected[key], value) > 100


def test_an_unknown_target_is_refused(tiny: Any) -> None:
    with pytest.raises(InputError, match="target 'coreml' is not known; choose one of onnxruntime, openvino, tensorrt"):
        emit(tiny.float_graph("rgb"), tiny.plan("rgb"), "coreml")  # type: ignore[arg-type]


def test_the_plan_of_another_model_is_refused(tiny: Any) -> None:
    with pytest.raises(ExportError, match=r"the plan is not of this graph: \d+ of its layers are not in it \(first: "):
        emit(tiny.float_graph("variance"), tiny.plan("text"), "openvino")


def test_a_plan_of_other_shapes_is_refused(tiny: Any) -> None:
    plan = tiny.plan("variance")
    first = plan.quantized[0]
    wrong = replace(first, weight_codes=first.codes[:, :, :1, :1])
    layers = tuple(wrong if item.name == first.name else item for item in plan.layers)
    with pytest.raises(ExportError, match=f"{first.name}"):
        emit(tiny.float_graph("variance"), QuantizationPlan(layers, plan.timestep_edges), "openvino")


# ------------------------------------------------------------------------------------------------------- shared weights


def test_shared_weights_store_equal_tensors_once(emitted: Any, run_graph: Any, tmp_path: Path) -> None:
    graphs = {tmp_path / f"{target}.onnx": emitted.graph("labels", target).clone() for target in TARGETS}
    feeds = emitted.feeds("labels", 2)
    before = {path: run_graph(model, feeds) for path, model in graphs.items()}
    large = [
        value.const_value.tobytes() for model in graphs.values() for value in model.graph.initializers.values()
        if value.const_value.nbytes >= 1024
    ]  # fmt: skip
    saved = save_with_shared_weights(graphs.items(), tmp_path / "weights.bin")
    unique = sum(len(data) for data in set(large))
    size = (tmp_path / "weights.bin").stat().st_size
    assert unique <= size < unique + 64 * len(set(large))
    assert saved == sum(map(len, large)) - unique
    assert saved > 0.2 * sum(map(len, large))
    for path in graphs:
        assert path.stat().st_size < size
        external = [
            t
            for t in onnx.load(path, load_external_data=False).graph.initializer
            if t.data_location == onnx.TensorProto.EXTERNAL
        ]
        assert external
        for tensor in external:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            assert entries["location"] == "weights.bin"
            assert int(entries["offset"]) % 64 == 0
        for key, value in run_graph(path, feeds).items():
            np.testing.assert_array_equal(value, before[path][key])


def test_graphs_and_weights_in_different_folders_are_refused(emitted: Any, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with pytest.raises(ExportError, match=r"other/a\.onnx and its weights .*weights\.bin must be in the same folder"):
        save_with_shared_weights(
            [(tmp_path / "other" / "a.onnx", emitted.graph("rgb", "openvino").clone())], tmp_path / "weights.bin"
        )


def test_a_graph_that_is_not_valid_is_refused(emitted: Any, tmp_path: Path) -> None:
    model = ir.to_proto(emitted.graph("rgb", "openvino"))
    model.graph.node[3].input[0] = "nowhere"
    onnx.save(model, tmp_path / "broken.onnx")
    with pytest.raises(ExportError, match=r"broken\.onnx is not a valid ONNX graph: .*nowhere"):
        check_onnx(tmp_path / "broken.onnx")


def test_the_bytes_of_all_inputs_and_results_are_those_of_the_values(tiny: Any, emitted: Any, run_graph: Any) -> None:
    plan, graph = tiny.plan("text"), tiny.float_graph("text")
    planned = {layer.name for layer in plan.quantized}
    names = [value.name for item in layer_nodes(graph) if item.name in planned for value in (item.data, item.output)]
    values = run_graph(with_outputs(graph, names), emitted.feeds("text", 2))
    assert bytes_per_row(graph, plan) == sum(values[name].nbytes for name in names) // 2
