"""The exported Triton repository: a valid configuration, and a graph that survives Triton's batches."""

import json
import re
import subprocess
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from click.testing import CliRunner

from qdm_deploy.artifacts.bundle import Bundle
from qdm_deploy.cli.main import cli
from qdm_deploy.errors import BundleError, ExportError, InputError
from qdm_deploy.pipeline import export_triton
from qdm_deploy.pipeline.triton_config import step_tensors
from qdm_export.relative_links import make_links_relative

OUTPUTS = ["next_sample", "x0", "next_history"]


def session(graph: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def parsed(config: Path) -> Any:
    package = find_spec("tritonclient")
    if package is None or package.origin is None:
        pytest.skip("tritonclient has Triton's schema, and it is not installed: pip install tritonclient protobuf")
    # The file itself: its package wants gRPC and more, for a client.
    schema = spec_from_file_location("model_config_pb2", Path(package.origin).parent / "grpc" / "model_config_pb2.py")
    assert schema is not None
    assert schema.loader is not None
    module = module_from_spec(schema)
    schema.loader.exec_module(module)
    text_format = pytest.importorskip("google.protobuf.text_format")
    return text_format.Parse(config.read_text(), module.ModelConfig())


def inputs_of(config: str) -> dict[str, tuple[str, list[int]]]:
    block = config[config.index("input [") : config.index("output [")]
    found = re.findall(
        r'name: "(\w+)", data_type: TYPE_(\w+), dims: \[ ([\d, ]+) \](, reshape: \{ shape: \[ \] \})?', block
    )
    return {
        name: (kind, [] if reshape else [int(size) for size in dims.split(",")]) for name, kind, dims, reshape in found
    }


@pytest.mark.parametrize("name", ["labels", "rgb"])
def test_the_configuration_fits_the_graph(request: pytest.FixtureRequest, tmp_path: Path, name: str) -> None:
    made = export_triton(request.getfixturevalue(name), tmp_path / "models", max_batch=12)
    assert (made.model, made.plan) == (f"{name}_step", None)
    folder = tmp_path / "models" / f"{name}_step"
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    # An ONNX model of several files is a folder that is called model.onnx.
    assert files == {"config.pbtxt", "1/model.onnx/model.onnx", "1/model.onnx/weights.bin"}
    config = (folder / "config.pbtxt").read_text()
    graph = session(folder / "1" / "model.onnx" / "model.onnx")
    kinds = {"tensor(float)": "FP32", "tensor(int64)": "INT64"}
    assert inputs_of(config) == {item.name: (kinds[item.type], item.shape[1:]) for item in graph.get_inputs()}
    assert [item.name for item in graph.get_outputs()] == OUTPUTS
    assert f'name: "{name}_step"\nbackend: "onnxruntime"\nmax_batch_size: 12\n' in config
    text = (tmp_path / "models" / "README.md").read_text()
    assert [f"`{item.name}`" for item in graph.get_inputs() if f"| `{item.name}` |" not in text] == []


@pytest.mark.parametrize(
    ("name", "backend"), [("labels", "onnxruntime"), ("labels", "tensorrt"), ("rgb", "onnxruntime")]
)
def test_the_configuration_follows_tritons_schema(
    request: pytest.FixtureRequest, tmp_path: Path, name: str, backend: str
) -> None:
    export_triton(request.getfixturevalue(name), tmp_path / "models", backend, 8)
    config = parsed(tmp_path / "models" / f"{name}_step" / "config.pbtxt")
    interface = Bundle.open(request.getfixturevalue(name)).pipeline.interface
    inputs, outputs = step_tensors(interface)
    assert config.name == f"{name}_step"
    assert (config.backend, config.platform) == (
        ("onnxruntime", "") if backend == "onnxruntime" else ("", "tensorrt_plan")
    )
    assert config.max_batch_size == 8
    assert [item.name for item in config.input] == [item.name for item in inputs]
    assert [list(item.dims) for item in config.output] == [list(item.shape) for item in outputs]
    for item, tensor in zip(config.input, inputs, strict=True):
        # Triton wants at least one dimension from clients.
        assert list(item.dims) == list(tensor.shape or (1,))
        assert item.HasField("reshape") == (not tensor.shape)
    assert config.HasField("dynamic_batching")
    assert [group.kind for group in config.instance_group] == [2 if backend == "onnxruntime" else 1]


def rows(bundle: Bundle, count: int, seed: int) -> dict[str, Any]:
    generator = np.random.default_rng(seed)
    model = bundle.pipeline
    image = (count, *model.sample_shape)
    coefficients = np.tile(np.array([1.1, -0.4, 1.0, 0.3, 0.7, 0.1, 0, 0, 0, 0.1, 1, 0, 0], np.float32), (count, 1))
    values: dict[str, Any] = {
        "sample": generator.standard_normal(image, dtype=np.float32),
        "timestep": np.full(count, generator.integers(0, model.denoiser.num_train_timesteps), np.int64),
        "coefficients": coefficients,
        "noise": generator.standard_normal(image, dtype=np.float32),
        "history": np.zeros((count, 3 * image[1], *image[2:]), np.float32),
        "class_labels": np.full(count, seed % 3, np.int64),
        "guidance": np.ones(count, np.float32),
    }
    return values


def test_requests_may_be_concatenated(labels: Path, tmp_path: Path) -> None:
    """What Triton's dynamic batcher does: guided and plain requests, at different steps, one behind the other."""
    export_triton(labels, tmp_path / "models")
    bundle = Bundle.open(labels)
    original = session(bundle.graph("onnxruntime"))
    exported = session(tmp_path / "models" / "labels_step" / "1" / "model.onnx" / "model.onnx")
    plain, guided, other = rows(bundle, 1, 1), rows(bundle, 2, 2), rows(bundle, 1, 4)
    guided["sample"][1] = guided["sample"][0]
    guided["noise"][1] = guided["noise"][0]
    guided["class_labels"][1] = bundle.pipeline.encoder.null_label
    guided["guidance"][:] = 2.5
    zero = np.zeros(1, np.int64)
    links = [
        ({"unconditional_row": zero, "owner_row": zero}, {"unconditional_offset": zero, "owner_offset": zero}),
        (
            {"unconditional_row": np.array([1, 1]), "owner_row": np.array([0, 0])},
            {"unconditional_offset": np.array([1, 0]), "owner_offset": np.array([0, -1])},
        ),
        ({"unconditional_row": zero, "owner_row": zero}, {"unconditional_offset": zero, "owner_offset": zero}),
    ]
    requests = [plain, guided, other]
    alone = [original.run(OUTPUTS, {**item, **link[0]}) for item, link in zip(requests, links, strict=True)]
    together = {
        name: np.concatenate([{**item, **link[1]}[name] for item, link in zip(requests, links, strict=True)])
        for name in [item.name for item in exported.get_inputs()]
    }
    for got, expected in zip(exported.run(OUTPUTS, together), zip(*alone, strict=True), strict=True):
        np.testing.assert_allclose(got, np.concatenate(expected), atol=1e-5)
    # The bundle's own graph could not: its links would all point into the first request, guided or not.
    broken = {**together, **{name: np.concatenate([link[0][name] for link in links]) for name in links[0][0]}}
    wrong = original.run(OUTPUTS, {item.name: broken[item.name] for item in original.get_inputs()})[0]
    assert np.abs(wrong[3] - alone[2][0][0]).max() > 0.1


def test_a_tensorrt_plan_is_built_where_it_runs(labels: Path, tmp_path: Path) -> None:
    made = export_triton(labels, tmp_path / "models", "tensorrt", 8)
    folder = tmp_path / "models" / "labels_step"
    assert made.plan == folder / "1" / "model.plan"
    assert not made.plan.exists()
    script = folder / "build_plan.sh"
    subprocess.run(["sh", "-n", str(script)], check=True)
    # A trtexec of the test writes down what it was asked for.
    tool = tmp_path / "bin" / "trtexec"
    tool.parent.mkdir()
    tool.write_text(
        '#!/bin/sh\nfor word; do echo "$word" >> words; case $word in --save*) touch "${word#*=}";; esac; done\n'
    )
    tool.chmod(0o755)
    subprocess.run([script], check=True, env={"PATH": f"{tool.parent}:/usr/bin:/bin"})
    assert made.plan.exists()
    words = dict(word.split("=", 1) for word in (folder / "1" / "words").read_text().split() if "=" in word)
    assert (folder / "1" / words["--onnx"]).is_file()
    graph = session(folder / "1" / words["--onnx"])
    for bound, count in (("--minShapes", 1), ("--optShapes", 4), ("--maxShapes", 8)):
        shapes = dict(item.split(":") for item in words[bound].split(","))
        assert shapes == {
            item.name: "x".join(str(size) for size in (count, *item.shape[1:])) for item in graph.get_inputs()
        }


def test_a_graph_without_links_has_none_to_rewrite(tiny: Any) -> None:
    with pytest.raises(ExportError, match=r"the step graph has no input unconditional_row"):
        make_links_relative(tiny.float_graph("rgb").clone())


@pytest.mark.slow
def test_the_graph_with_relative_links_becomes_an_engine(labels: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    from qdm_deploy.engines.engine import engine_from_onnx

    export_triton(labels, tmp_path / "models", "tensorrt", 8)
    graph = tmp_path / "models" / "labels_step" / "1" / "source" / "model.onnx"
    engine = engine_from_onnx(graph, backend="tensorrt-rtx", sm="8.9", planned=())
    assert engine.path.stat().st_size > 0


def test_what_cannot_be_exported_is_refused(labels: Path, rgb: Path, tmp_path: Path) -> None:
    out = tmp_path / "models"
    with pytest.raises(InputError, match=r"unknown backend 'tensort' \(did you mean tensorrt\?\)"):
        export_triton(labels, out, "tensort")
    with pytest.raises(InputError, match=r"max batch is 1; it must be from 2 to 1024"):
        export_triton(labels, out, max_batch=1)
    with pytest.raises(InputError, match=r"max batch is 0; it must be from 1 to 1024"):
        export_triton(rgb, out, max_batch=0)
    with pytest.raises(BundleError, match=r"has no graph for 'tensorrt'; it has: onnxruntime"):
        export_triton(rgb, out, "tensorrt")
    assert list(tmp_path.iterdir()) == []
    export_triton(rgb, out)
    with pytest.raises(InputError, match=r"models exists: choose another name, or replace it with --force"):
        export_triton(rgb, out)
    export_triton(labels, out, force=True)
    assert (out / "labels_step").is_dir()
    assert not (out / "rgb_step").exists()
    (out / "README.md").write_text("mine")
    with pytest.raises(InputError, match=r"models is not a model repository of an earlier export"):
        export_triton(rgb, out, force=True)


def test_the_command_says_what_it_wrote(labels: Path, tmp_path: Path) -> None:
    words = ["export-triton", str(labels), "--out", str(tmp_path / "models"), "--json"]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert (document["command"], document["model"], document["plan"]) == ("export-triton", "labels_step", None)
