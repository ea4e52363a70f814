"""The exported step graph against PyTorch and the numpy sampler: any batch, guided rows among others."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from qdm_deploy.artifacts.pipeline_spec import LabelTable
from qdm_deploy.samplers import apply_step
from qdm_export.float_graph import OPSET, save_graph
from qdm_export.step_graph import StepGraph

NAMES = ("labels", "rgb", "text", "variance")
Feeds = dict[str, NDArray[Any]]


def sqnr_db(reference: Any, value: Any) -> float:
    noise = ((reference.astype(np.float64) - value) ** 2).sum()
    return float(10 * np.log10((reference.astype(np.float64) ** 2).sum() / max(noise, 1e-30)))


OUTPUTS = ("next_sample", "x0", "next_history")


def by_hand(tiny: Any, name: str, feeds: Feeds) -> tuple[Any, ...]:
    """The step in numpy around diffusers' own U-Net."""
    spec = tiny.checkpoint(name).spec
    conditioning = {item.name: torch.from_numpy(feeds[item.name]) for item in spec.interface.conditions}
    with torch.inference_mode():
        unet = tiny.checkpoint(name).unet.unet
        output = unet(
            torch.from_numpy(feeds["sample"]), torch.from_numpy(feeds["timestep"]), **conditioning
        ).sample.numpy()
    if spec.conditional:
        free = output[feeds["unconditional_row"]]
        own, output = output, free + feeds["guidance"].reshape(-1, 1, 1, 1) * (output - free)
        if "guidance_rescale" in feeds:
            # diffusers' rescale_noise_cfg, with a share of each row's own
            spread = [values.std(axis=(1, 2, 3), ddof=1, keepdims=True) for values in (own, output)]
            share = feeds["guidance_rescale"].reshape(-1, 1, 1, 1)
            output = share * output * (spread[0] / spread[1]) + (1 - share) * output
    found = apply_step(feeds["coefficients"], feeds["sample"], output, feeds["history"], feeds["noise"])
    return tuple(value[feeds["owner_row"]] for value in found) if spec.conditional else found


def different_rows(feeds: Feeds, columns: int) -> Feeds:
    """Every row with its own timestep and coefficients."""
    rng = np.random.default_rng(4)
    batch = len(feeds["sample"])
    feeds["timestep"] = rng.permutation(1000)[:batch].astype(feeds["timestep"].dtype)
    if feeds["timestep"].dtype == np.float32:
        feeds["timestep"] += np.float32(0.25)  # one between two timesteps has a meaning here
    if "guidance_rescale" in feeds:
        feeds["guidance_rescale"] = rng.uniform(0.0, 1.0, batch).astype(np.float32)
    coefficients = rng.uniform(0.2, 1.2, (batch, columns)).astype(np.float32)
    if columns == 15:
        coefficients[:, 13:] = [-9.0, -2.0]
    feeds["coefficients"] = coefficients
    return feeds


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("name", NAMES)
def test_the_graph_is_the_step(tiny: Any, emitted: Any, run_graph: Any, name: str, batch: int) -> None:
    feeds = different_rows(emitted.feeds(name, batch), tiny.checkpoint(name).spec.interface.num_coefficients)
    found = run_graph(tiny.float_graph(name), feeds)
    for expected, key in zip(by_hand(tiny, name, feeds), OUTPUTS, strict=True):
        assert found[key].shape == expected.shape
        assert sqnr_db(expected, found[key]) > 100
        assert np.abs(expected - found[key]).max() < 1e-4


@pytest.mark.parametrize("name", ["labels", "text", "variance"])
def test_guided_and_unguided_rows_share_a_batch(tiny: Any, emitted: Any, run_graph: Any, name: str) -> None:
    feeds = different_rows(emitted.feeds(name, 5), tiny.checkpoint(name).spec.interface.num_coefficients)
    # Row 3 is the unconditional twin of row 0, row 4 that of row 2; row 1 is alone.
    feeds["unconditional_row"], feeds["owner_row"] = np.array([3, 1, 4, 3, 4]), np.array([0, 1, 2, 0, 2])
    feeds["guidance"] = np.array([3.0, 1.0, -0.5, 1.0, 1.0], dtype=np.float32)
    if name != "text":
        feeds["class_labels"] = np.array([0, 1, 2, 2, 1])
    for key in ("sample", "timestep", "coefficients", "noise", "history"):
        feeds[key][[3, 4]] = feeds[key][[0, 2]]
    found = run_graph(tiny.float_graph(name), feeds)
    for expected, key in zip(by_hand(tiny, name, feeds), OUTPUTS, strict=True):
        assert sqnr_db(expected, found[key]) > 100
        np.testing.assert_array_equal(found[key][[3, 4]], found[key][[0, 2]])  # a twin takes its owner's state
    unguided = run_graph(tiny.float_graph(name), {**feeds, "guidance": np.ones(5, dtype=np.float32)})
    assert sqnr_db(unguided["x0"][1], found["x0"][1]) > 100
    assert sqnr_db(unguided["x0"][0], found["x0"][0]) < 60


def test_the_module_is_the_graph(tiny: Any, emitted: Any, run_graph: Any) -> None:
    feeds = emitted.feeds("variance", 2)
    module = StepGraph(tiny.checkpoint("variance").unet, tiny.checkpoint("variance").denoiser)
    with torch.inference_mode():
        following, _, _ = module(*(torch.from_numpy(feeds[name]) for name in module.interface.input_names))
    assert sqnr_db(following.numpy(), run_graph(tiny.float_graph("variance"), feeds)["next_sample"]) > 100


def test_a_row_depends_on_no_other(tiny: Any, emitted: Any, run_graph: Any) -> None:
    feeds = different_rows(emitted.feeds("rgb", 4), 13)
    whole = run_graph(tiny.float_graph("rgb"), feeds)
    for row in range(4):
        alone = run_graph(tiny.float_graph("rgb"), {key: value[row : row + 1] for key, value in feeds.items()})
        assert np.abs(alone["next_sample"][0] - whole["next_sample"][row]).max() < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_inputs_follow_the_spec(tiny: Any, name: str) -> None:
    graph = tiny.float_graph(name).graph
    spec = tiny.checkpoint(name).spec
    expected = [
        "sample",
        "timestep",
        "coefficients",
        "noise",
        "history",
        *(item.name for item in spec.interface.conditions),
    ]
    rescaled = ["guidance_rescale"] if name == "text" else []
    expected += ["guidance", *rescaled, "unconditional_row", "owner_row"] if spec.conditional else []
    assert [value.name for value in graph.inputs] == list(spec.interface.input_names) == expected
    for value, item in zip(graph.inputs, spec.interface, strict=True):
        assert tuple(value.shape)[1:] == item.row_shape
        assert not isinstance(value.shape[0], int)
    assert [value.name for value in graph.outputs] == list(OUTPUTS)
    assert tiny.float_graph(name).opset_imports[""] == OPSET == 21


def test_nothing_of_the_machine_stays_in_the_graph(tiny: Any, tmp_path: Any, repository: Any) -> None:
    save_graph(tiny.float_graph("variance").clone(), tmp_path / "g.onnx", weights="g.bin")
    text = (tmp_path / "g.onnx").read_bytes()
    assert str(repository).encode() not in text
    assert b"site-packages" not in text
    assert b"stack_trace" not in text
    assert (tmp_path / "g.bin").stat().st_size > 4 * 90_000


def test_a_saved_graph_runs_with_its_weights_beside_it(tiny: Any, emitted: Any, run_graph: Any, tmp_path: Any) -> None:
    feeds = emitted.feeds("variance", 2)
    expected = run_graph(tiny.float_graph("variance"), feeds)
    save_graph(tiny.float_graph("variance").clone(), tmp_path / "inline.onnx")
    save_graph(tiny.float_graph("variance").clone(), tmp_path / "split.onnx", weights="split.bin")
    for name in ("inline", "split"):
        np.testing.assert_array_equal(run_graph(tmp_path / f"{name}.onnx", feeds)["x0"], expected["x0"])
    assert (tmp_path / "split.onnx").stat().st_size < (tmp_path / "inline.onnx").stat().st_size / 2


def test_time_is_a_table_of_float32_rows(tiny: Any, emitted: Any, run_graph: Any) -> None:
    graph = tiny.float_graph("rgb").graph
    table = graph.initializers["time_table"].const_value.numpy()
    assert table.dtype == np.float32
    assert len(table) == 1000
    assert not any(node.op_type in ("Sin", "Cos") for node in graph)
    # Neighbouring timesteps that bfloat16 would merge stay apart.
    feeds = emitted.feeds("rgb", 2)
    feeds = {key: np.repeat(value[:1], 2, axis=0) for key, value in feeds.items()}
    feeds["timestep"] = np.array([994, 995])
    result = run_graph(tiny.float_graph("rgb"), feeds)["x0"]
    assert np.abs(result[0] - result[1]).max() > 1e-6


@pytest.mark.slow
def test_the_embedded_model_is_exported_exactly(repository: Any, run_graph: Any) -> None:
    from qdm_export.float_graph import example_inputs, export_float_graph
    from qdm_export.topology import topology_of
    from qdm_export.unet import load_checkpoint

    folder = repository / "qdm_deploy" / "data" / "ddpm-fashion-mnist"
    checkpoint = load_checkpoint(folder)
    model = export_float_graph(checkpoint)
    pairs = zip(checkpoint.denoiser.interface, example_inputs(checkpoint, 3, 9), strict=True)
    feeds = {spec.name: value.numpy() for spec, value in pairs}
    with torch.inference_mode():
        step = StepGraph(checkpoint.unet, checkpoint.denoiser)
        expected = step(*(torch.from_numpy(feeds[name]) for name in step.interface.input_names))[1].numpy()
    assert sqnr_db(expected, run_graph(model, feeds)["x0"]) > 100
    layers = topology_of(model)
    assert isinstance(checkpoint.spec.encoder, LabelTable)
    assert checkpoint.spec.encoder.labels is not None
    assert len(json.loads((folder / "labels.json").read_text())) == len(checkpoint.spec.encoder.labels) == 10
    assert (
        sum(layer.reads_concat and not layer.normalized for layer in layers) == 9
    )  # conv_shortcut of 3 x 3 up resnets
