"""A split network and a split graph compute what the whole ones do, and agree on what was split."""

import dataclasses
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import nn

from qdm_deploy.building.checks import run_graph
from qdm_deploy.errors import ExportError
from qdm_deploy.metrics.error import max_abs_difference
from qdm_deploy.samplers.random_inputs import random_inputs
from qdm_export.check import check_onnx
from qdm_export.float_graph import save_graph
from qdm_export.split_concat import SplitConv2d, concat_readers, split_checkpoint, split_graph, split_network
from qdm_export.targets import emit_float
from qdm_export.topology import topology_of

NAMES = ("labels", "rgb", "text", "variance")
SHORTCUT = "up_blocks.0.resnets.0.conv_shortcut"


class Said:
    """A progress that remembers."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)

    def task(self, description: str, total: int | None) -> Any:
        raise NotImplementedError


@pytest.mark.parametrize("name", NAMES)
def test_every_shortcut_of_an_up_block_is_split_once_where_its_branches_are_wide_enough(tiny: Any, name: str) -> None:
    unet = tiny.checkpoint(name).unet.unet
    readers = concat_readers(tiny.float_graph(name))
    shortcuts = {
        path: module.in_channels
        for path, module in unet.named_modules()
        if path.startswith("up_blocks") and path.endswith("conv_shortcut") and module.out_channels >= 16
    }
    assert readers.split.keys() | readers.whole.keys() == shortcuts.keys()
    assert {path: sum(widths) for path, widths in readers.split.items()}.items() <= shortcuts.items()
    if name == "rgb":
        assert set(readers.whole.values()) == {"a branch of 8 channels is too narrow for an INT8 layer of its own"}
    else:
        assert not readers.whole


@pytest.mark.parametrize("name", NAMES)
def test_network_and_graph_compute_what_the_whole_ones_do(tiny: Any, tmp_path: Path, name: str) -> None:
    checkpoint, graph = tiny.checkpoint(name), tiny.float_graph(name)
    split, split_step = split_checkpoint(checkpoint, graph)
    inputs = random_inputs(checkpoint.denoiser, 3)
    arguments = {item.name: torch.from_numpy(inputs[item.name]) for item in checkpoint.denoiser.interface.conditions}
    rows = torch.from_numpy(inputs["sample"]), torch.from_numpy(inputs["timestep"])
    with torch.inference_mode():
        outputs = [item.unet(*rows, **arguments).numpy() for item in (checkpoint, split)]
    assert max_abs_difference(*outputs) <= 1e-5
    results = []
    for label, model in (("whole", graph), ("split", split_step)):
        path = tmp_path / f"{label}.onnx"
        save_graph(emit_float(model).model, path, weights=f"{label}.data")
        check_onnx(path)
        results.append([run_graph(backend, path, inputs)["x0"] for backend in ("onnxruntime", "openvino")])
    for whole, parts in zip(*results, strict=True):
        assert max_abs_difference(whole, parts) <= 1e-5


def test_the_layers_of_the_split_graph_are_the_modules_of_the_split_network(tiny: Any) -> None:
    checkpoint, graph = split_checkpoint(tiny.checkpoint("labels"), tiny.float_graph("labels"))
    readers = concat_readers(tiny.float_graph("labels"))
    topology = topology_of(graph)
    assert len(topology) == len(tiny.topology("labels")) + sum(len(widths) - 1 for widths in readers.split.values())
    for name, widths in readers.split.items():
        with pytest.raises(KeyError):
            topology.layer(name)
        for index, width in enumerate(widths):
            layer = topology.layer(f"{name}.branches.{index}")
            module = checkpoint.unet.unet.get_submodule(layer.name)
            assert layer.weight_shape == tuple(module.weight.shape)
            assert (layer.in_channels, layer.branches) == (width, (width,))
            assert layer.float_reason is None
            assert torch.equal(module.bias * len(widths), tiny.checkpoint("labels").unet.unet.get_submodule(name).bias)
    assert concat_readers(graph).split == {}


def test_the_originals_stay_as_they_are_and_weights_are_shared(tiny: Any) -> None:
    checkpoint, graph = tiny.checkpoint("labels"), tiny.float_graph("labels")
    nodes = [node.name for node in graph.graph]
    split, _ = split_checkpoint(checkpoint, graph)
    assert isinstance(checkpoint.unet.unet.get_submodule(SHORTCUT), nn.Conv2d)
    assert [node.name for node in graph.graph] == nodes
    assert split.unet.unet.conv_in.weight is checkpoint.unet.unet.conv_in.weight
    part = split.unet.get_parameter(f"unet.{SHORTCUT}.branches.0.weight")
    assert part.data_ptr() == checkpoint.unet.get_parameter(f"unet.{SHORTCUT}.weight").data_ptr()


def test_a_concatenation_that_nothing_else_reads_goes(tiny: Any) -> None:
    graph = tiny.float_graph("labels").clone()
    concats = [node for node in graph.graph if node.op_type == "Concat"]
    shortcut = next(node for node in graph.graph if node.metadata_props.get("qdm.module", "").endswith(SHORTCUT))
    concat = shortcut.inputs[0].producer()
    for use in list(concat.outputs[0].uses()):
        if use.node is not shortcut:
            alone = ir.node("Concat", concat.inputs, {"axis": 1}, name="another")
            alone.outputs[0].shape, alone.outputs[0].type = concat.outputs[0].shape, concat.outputs[0].type
            graph.graph.insert_after(concat, alone)
            use.node.replace_input_with(use.idx, alone.outputs[0])
    readers = concat_readers(graph)
    left = [node.name for node in split_graph(graph, {SHORTCUT: readers.split[SHORTCUT]}).graph]
    assert concat.name not in left
    assert {node.name for node in concats} - {concat.name} <= set(left)


def test_what_stands_between_is_said_and_the_layer_stays_whole(tiny: Any) -> None:
    graph = tiny.float_graph("labels").clone()
    shortcut = next(node for node in graph.graph if node.metadata_props.get("qdm.module", "").endswith(SHORTCUT))
    data = shortcut.inputs[0]
    between = ir.node("Identity", [data], name="between")
    between.outputs[0].shape, between.outputs[0].type = data.shape, data.type
    graph.graph.insert_before(shortcut, between)
    shortcut.replace_input_with(0, between.outputs[0])
    said = Said()
    split, parts = split_checkpoint(tiny.checkpoint("labels"), graph, said)
    assert said.lines == [f"{SHORTCUT} is not split: Identity stands between it and the concatenation"]
    assert isinstance(split.unet.unet.get_submodule(SHORTCUT), nn.Conv2d)
    assert topology_of(parts).layer(SHORTCUT).reads_concat


def test_a_network_without_concatenations_stays_as_it_is(tiny: Any) -> None:
    graph = split_graph(tiny.float_graph("labels"), concat_readers(tiny.float_graph("labels")).split)
    checkpoint, said = tiny.checkpoint("labels"), Said()
    assert split_checkpoint(checkpoint, graph, said) == (checkpoint, graph)
    assert said.lines == [
        "No layer reads a skip concatenation that can be split, so 'split' is the same as 'none' here"
    ]


@pytest.mark.parametrize("options", [{"stride": 2}, {"padding": 0}, {"bias": False}, {"dilation": 2}])
def test_a_split_convolution_keeps_the_options_of_the_whole_one(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    whole = nn.Conv2d(7, 5, 3, **{"padding": 1, **options})
    x = torch.randn(2, 7, 9, 8)
    with torch.inference_mode():
        torch.testing.assert_close(SplitConv2d(whole, (3, 1, 3))(x), whole(x), atol=1e-5, rtol=0)


def test_what_cannot_be_split_is_refused(tiny: Any) -> None:
    graph, network = tiny.float_graph("labels"), tiny.checkpoint("labels").unet
    with pytest.raises(ExportError, match=r"6 channels in 2 groups cannot be split at \(3, 3\)"):
        SplitConv2d(nn.Conv2d(6, 4, 1, groups=2), (3, 3))
    with pytest.raises(ExportError, match=r"64 channels in 1 groups cannot be split at \(3, 3\)"):
        split_network(network, {SHORTCUT: (3, 3)})
    with pytest.raises(ExportError, match=r"time_embedding\.linear_1 is a Linear; only a Conv2d can be split"):
        split_network(network, {"time_embedding.linear_1": (8, 8)})
    with pytest.raises(ExportError, match="nothing is to be split and is no layer of this graph"):
        split_graph(graph, {"nothing": (8, 8)})
    with pytest.raises(ExportError, match=r"conv_in does not read a concatenation of 2 branches"):
        split_graph(graph, {"conv_in": (8, 8)})
    with pytest.raises(ExportError, match=rf"{SHORTCUT} reads 64 channels and cannot be split at \(3, 3\)"):
        split_graph(graph, {SHORTCUT: (3, 3)})


def test_a_matrix_product_stays_whole(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No U-Net of diffusers has one, so the topology is told that this layer is."""
    from qdm_export import split_concat

    topology = topology_of(tiny.float_graph("labels"))
    layers = tuple(dataclasses.replace(item, kind="linear") if item.name == SHORTCUT else item for item in topology)
    monkeypatch.setattr(split_concat, "topology_of", lambda graph: dataclasses.replace(topology, layers=layers))
    readers = concat_readers(tiny.float_graph("labels"))
    assert readers.whole == {SHORTCUT: "it is a matrix product; only convolutions are split"}
    assert SHORTCUT not in readers.split
