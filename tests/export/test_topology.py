"""The structure that is read from a graph, against what diffusers' own modules say."""

from typing import Any

import pytest
import torch
from torch import nn

from qdm_deploy.artifacts.topology import Topology
from qdm_deploy.errors import ExportError
from qdm_export.topology import MODULE_KEY, layer_nodes, topology_of

NAMES = ("labels", "rgb", "text", "variance")
# diffusers pads below and to the right before the convolution (downsample_padding=0); the graph's Conv does both.
PADDED_BEFORE = {"rgb": "down_blocks.0.downsamplers.0.conv"}


@pytest.mark.parametrize("name", NAMES)
def test_every_conv_and_linear_that_reads_the_sample_is_a_layer(tiny: Any, name: str) -> None:
    modules = dict(tiny.checkpoint(name).unet.unet.named_modules())
    expected = {
        path: tuple(module.weight.shape)
        for path, module in modules.items()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }
    found = {layer.name: layer for layer in tiny.topology(name)}
    # What only depends on the timestep may be folded into a table.
    assert {path for path in expected if "time_embedding" not in path} <= found.keys() <= expected.keys()
    for path, layer in found.items():
        module = modules[path]
        assert layer.weight_shape == expected[path]
        assert layer.kind == ("conv" if isinstance(module, nn.Conv2d) else "linear")
        if isinstance(module, nn.Conv2d):
            assert layer.strides == module.stride
            assert layer.pads == ((0, 0, 1, 1) if path == PADDED_BEFORE.get(name) else module.padding * 2)
            assert layer.in_channels == module.in_channels
            assert layer.out_channels == module.out_channels


@pytest.mark.parametrize("name", NAMES)
def test_order_inputs_sizes_and_branches_are_what_a_forward_pass_meets(tiny: Any, name: str) -> None:
    unet, topology, calibration = tiny.checkpoint(name).unet, tiny.topology(name), tiny.calibration(name)
    order: list[str] = []
    shapes: dict[str, Any] = {}
    data: dict[str, torch.Tensor] = {}
    concatenated: dict[int, tuple[int, ...]] = {}
    keep: list[torch.Tensor] = []
    handles = []
    for layer in topology:

        def hook(module: nn.Module, args: Any, path: str = layer.name) -> None:
            order.append(path)
            shapes[path], data[path] = tuple(args[0].shape), args[0]

        handles.append(unet.unet.get_submodule(layer.name).register_forward_pre_hook(hook))
    original = torch.cat

    def cat(tensors: Any, dim: int = 0, **rest: Any) -> torch.Tensor:
        result = original(tensors, dim=dim, **rest)
        if result.ndim == 4 and dim == 1:
            keep.append(result)
            concatenated[id(result)] = tuple(t.shape[1] for t in tensors)
        return result

    conditioning = {key: torch.from_numpy(value[:1]) for key, value in calibration.conditioning.items()}
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(torch, "cat", cat)
        unet(torch.from_numpy(calibration.sample[:1]), torch.tensor([5]), **conditioning)
    for handle in handles:
        handle.remove()
    heads = [layer.name for layer in topology]
    assert sorted(order) == sorted(heads)
    ours = [
        path
        for path in heads
        if "emb_proj" not in path and "shortcut" not in path and "attn" not in path and ".to_" not in path
    ]
    theirs = [path for path in order if path in ours]
    assert theirs == ours  # parallel branches may be listed in either order, the main path may not
    for layer in topology:
        if layer.kind == "conv":
            padded = int(layer.name == PADDED_BEFORE.get(name))
            assert layer.spatial == tuple(size - padded for size in shapes[layer.name][2:])
        if id(data[layer.name]) in concatenated:
            assert layer.branches == concatenated[id(data[layer.name])]
            assert not layer.normalized
    skipping = [layer for layer in topology if layer.reads_concat]
    assert {layer.name for layer in skipping} == {
        layer.name for layer in topology
        if layer.name.startswith("up_blocks") and layer.name.endswith(("conv1", "conv_shortcut"))
    }  # fmt: skip
    for layer in skipping:
        assert sum(layer.branches) == layer.in_channels
        assert layer.normalized == layer.name.endswith("conv1")
    # The time embedding's sum stands between a conv1 and its norm2; a conv2 goes to the residual sum first.
    assert {layer.name for layer in topology if layer.feeds_norm} == {
        layer.name for layer in topology if layer.name.endswith("conv1")
    }
    same = {a.name: b.name for a in topology for b in topology if data[a.name] is data[b.name] and a.name > b.name}
    for first, second in same.items():
        assert topology.layer(first).input_group == topology.layer(second).input_group
    groups = [layer for layer in topology if layer.input_group != layer.name]
    assert all(torch.equal(data[layer.name], data[layer.input_group]) for layer in groups)


@pytest.mark.parametrize("name", NAMES)
def test_float_reasons(tiny: Any, name: str) -> None:
    for layer in tiny.topology(name):
        reason = layer.float_reason
        if layer.name == "conv_in":
            assert reason == "first convolution: reads the sample itself"
        elif layer.name == "conv_out":
            assert reason == "last convolution: its output is the model's output"
        elif "emb" in layer.name or ("attn2.to_" in layer.name and layer.name.endswith(("to_k", "to_v"))):
            assert reason == "does not depend on the sample (time embedding or conditioning path)"
        elif min(layer.weight_shape[:2]) < 16:
            assert reason == "narrower than 16 channels"
            assert name == "rgb"
        else:
            assert reason is None


def test_the_topology_does_not_go_by_names(tiny: Any) -> None:
    model = tiny.float_graph("labels").clone()
    renamed = {layer.name: f"m{i}.x" for i, layer in enumerate(tiny.topology("labels"))}
    for i, node in enumerate(model.graph):
        path = node.metadata_props.get(MODULE_KEY, "").removeprefix("net.unet.")
        if path in renamed:
            node.metadata_props[MODULE_KEY] = f"net.unet.{renamed[path]}"
        node.name = f"q{i}"
        for j, value in enumerate(node.outputs):
            if value not in model.graph.outputs:
                value.name = f"v{i}_{j}"
    expected = [
        (
            renamed[a.name],
            renamed[a.input_group],
            a.branches,
            a.normalized,
            a.strides,
            a.pads,
            a.spatial,
            a.float_reason,
            a.feeds_norm,
        )
        for a in tiny.topology("labels")
    ]
    found = [
        (a.name, a.input_group, a.branches, a.normalized, a.strides, a.pads, a.spatial, a.float_reason, a.feeds_norm)
        for a in topology_of(model)
    ]
    assert found == expected


def test_groups_hold_the_candidates_in_order(tiny: Any) -> None:
    topology: Topology = tiny.topology("labels")
    groups = topology.groups()
    assert sorted(layer.name for layers in groups.values() for layer in layers) == sorted(
        a.name for a in topology.candidates
    )
    assert all(name == layers[0].name for name, layers in groups.items())
    assert {tuple(a.name.rpartition(".")[2] for a in layers) for layers in groups.values() if len(layers) > 1} == {
        ("to_q", "to_k", "to_v")
    }
    with pytest.raises(KeyError, match="nowhere"):
        topology.layer("nowhere")


def test_biases_are_found_behind_their_layer(tiny: Any) -> None:
    modules = dict(tiny.checkpoint("text").unet.unet.named_modules())
    for item in layer_nodes(tiny.float_graph("text")):
        bias = modules[item.name].bias
        assert (item.bias is None) == (bias is None), item.name
        if item.bias is not None:
            assert torch.equal(torch.from_numpy(item.bias.const_value.numpy().copy()).flatten(), bias.flatten())


def test_a_layer_that_runs_twice_is_refused(small: Any) -> None:
    graph = small((3, 5, 5))
    graph.output(graph.conv("conv", seed=0))
    graph.output(graph.node("Conv", [graph.x, graph.graph.initializers["conv.weight"]], [3, 3, 3], module="conv"))
    with pytest.raises(ExportError, match=r"run more than once per step, which a per-layer plan cannot describe: conv"):
        layer_nodes(graph.model)


def test_a_node_without_a_module_is_refused(small: Any) -> None:
    graph = small((3, 5, 5))
    graph.output(graph.node("Conv", [graph.x, graph.constant("w", torch.zeros(3, 3, 3, 3).numpy())], [3, 3, 3]))
    with pytest.raises(ExportError, match=r"node 'n0' \(Conv\) does not say which module it came from"):
        layer_nodes(graph.model)


def test_a_convolution_of_unknown_size_is_refused(small: Any) -> None:
    import onnx_ir as ir

    graph = small((3, 5, 5))
    graph.output(graph.conv())
    graph.x.shape = ir.Shape(["batch", 3, "height", 5])
    with pytest.raises(ExportError, match="the input of conv has no static height and width"):
        topology_of(graph.model)
