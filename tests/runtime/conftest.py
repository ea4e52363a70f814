"""Tiny step graphs whose network is linear, so that numpy knows every number of a whole run.

The network: e[o] = sum_c weight[o, c] * sample[c] + time_table[timestep] + label_bias[label, o].
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from qdm_deploy.artifacts.pipeline_spec import Denoiser, LabelTable, PipelineSpec
from qdm_deploy.artifacts.step_interface import StepInterface, TensorSpec
from qdm_deploy.backends.onnxruntime.session import OnnxRuntimeSession
from qdm_deploy.backends.openvino.session import OpenVinoSession
from qdm_deploy.samplers.columns import COEFFICIENTS, LEARNED_VARIANCE_COEFFICIENTS
from qdm_deploy.samplers.conditioning import Conditioning
from qdm_deploy.samplers.sampling import Sampling
from qdm_deploy.samplers.schedule import NoiseSchedule
from qdm_deploy.samplers.step import apply_step
from qdm_deploy.samplers.table import StepTable, step_table

CHANNELS, SIDE, CLASSES, TIMESTEPS = 3, 4, 5, 100
NULL = CLASSES
SHAPE = (CHANNELS, SIDE, SIDE)


@dataclass(frozen=True)
class Tiny:
    """A tiny model: its step graph on disk, its spec and its network in numpy."""

    graph: Path
    spec: PipelineSpec
    weight: NDArray[np.float32]
    time_table: NDArray[np.float32]
    label_bias: NDArray[np.float32]

    def network(self, sample: Any, timestep: float, labels: Any | None) -> Any:
        output = np.einsum("oc,nchw->nohw", self.weight, sample) + self.time_table[int(timestep)]
        return output if labels is None else output + self.label_bias[labels][:, :, None, None]

    def run(
        self, table: StepTable, start: Any, noise: Callable[[int], Any], labels: Any = None, guidance: float = 1.0
    ) -> Any:
        """The whole loop in closed form: the network above through ``apply_step``."""
        sample, history = start, np.repeat(np.zeros_like(start), 3, axis=1)
        for step, timestep in enumerate(table.timesteps):
            output = self.network(sample, timestep, labels)
            if guidance != 1.0:
                free = self.network(sample, timestep, np.full(len(start), NULL))
                output = free + np.float32(guidance) * (output - free)
            rows = np.repeat(table.coefficients[step : step + 1], len(start), axis=0)
            sample, _, history = apply_step(rows, sample, output, history, noise(step))
        return sample

    def sampling(self, table: StepTable, seeds: Any, labels: Any = None, **options: Any) -> Sampling:
        """What to make of the model, with the null label as its unconditional twin."""
        if labels is None:
            return Sampling(table, seeds, **options)
        own, null = np.asarray(labels, np.int64), np.array([NULL], np.int64)
        return Sampling(table, seeds, Conditioning({"class_labels": own}, {"class_labels": null}), **options)


def write_tiny(path: Path, *, conditional: bool = False, learned: bool = False, arithmetic_time: bool = False) -> Tiny:
    """Write a step graph; ``arithmetic_time`` computes the time term from the timestep instead of looking it up."""
    rng = np.random.default_rng(5)
    outputs = CHANNELS * (2 if learned else 1)
    width = len(LEARNED_VARIANCE_COEFFICIENTS if learned else COEFFICIENTS)
    weight = (0.3 * rng.standard_normal((outputs, CHANNELS))).astype(np.float32)
    time_table = np.linspace(-0.5, 0.5, TIMESTEPS, dtype=np.float32)
    label_bias = rng.standard_normal((CLASSES + 1, outputs)).astype(np.float32)
    constants: dict[str, NDArray[Any]] = {
        "weight": weight.reshape(outputs, CHANNELS, 1, 1),
        "time_table": time_table.reshape(TIMESTEPS, 1, 1, 1),
        "label_bias": label_bias.reshape(CLASSES + 1, outputs, 1, 1),
        "column": np.array([0, width, 1, 1], np.int64),
        "row": np.array([-1, 1, 1, 1], np.int64),
        "slope": np.array(1.0 / TIMESTEPS, np.float32),
        "one": np.array(1.0, np.float32),
        "half": np.array(0.5, np.float32),
    }
    nodes: list[onnx.NodeProto] = []

    def op(kind: str, inputs: str, output: str, **attributes: Any) -> None:
        nodes.append(helper.make_node(kind, inputs.split(), output.split(), **attributes))

    op("Conv", "sample weight", "mixed")
    if arithmetic_time:
        op("Cast", "timestep", "time_float", to=TensorProto.FLOAT)
        op("Mul", "time_float slope", "time_flat")
        op("Reshape", "time_flat row", "time")
    else:
        op("Gather", "time_table timestep", "time")
    op("Add", "mixed time", "e_free" if conditional else "e")
    if conditional:
        op("Gather", "label_bias class_labels", "bias")
        op("Add", "e_free bias", "e_own")
        op("Gather", "e_own unconditional_row", "e_null")
        op("Sub", "e_own e_null", "direction")
        op("Reshape", "guidance row", "strength")
        op("Mul", "strength direction", "guided")
        op("Add", "e_null guided", "e")
    op("Reshape", "coefficients column", "columns")
    op("Split", "columns", " ".join(COEFFICIENTS) + (" low high" if learned else ""), axis=1, num_outputs=width)
    op("Split", "history", "h0 h1 h2", axis=1, num_outputs=3)
    if learned:
        op("Split", "e", "mean spread", axis=1, num_outputs=2)
        for kind, inputs, output in [
            ("Add", "spread one", "spread1"),
            ("Mul", "spread1 half", "share"),
            ("Mul", "share high", "upper"),
            ("Sub", "one share", "rest"),
            ("Mul", "rest low", "lower"),
            ("Add", "upper lower", "log_variance"),
            ("Mul", "log_variance half", "log_std"),
            ("Exp", "log_std", "std"),
            ("Mul", "std noise", "scaled_noise"),
        ]:
            op(kind, inputs, output)
    for kind, inputs, output in [
        ("Mul", "p sample", "px"),
        ("Identity", "mean" if learned else "e", "output"),
        ("Mul", "q output", "qe"),
        ("Add", "px qe", "raw"),
        ("Min", "raw clip", "below"),
        ("Neg", "clip", "floor"),
        ("Max", "below floor", "clean"),
        ("Mul", "a sample", "ax"),
        ("Mul", "b clean", "bx"),
        ("Mul", "g output", "ge"),
        ("Mul", "c0 h0", "ch0"),
        ("Mul", "c1 h1", "ch1"),
        ("Mul", "c2 h2", "ch2"),
        ("Mul", "d scaled_noise" if learned else "d noise", "dn"),
        ("Sum", "ax bx ge ch0 ch1 ch2 dn", "next"),
        ("Mul", "u clean", "ux"),
        ("Mul", "v output", "ve"),
        ("Mul", "w h0", "wh"),
        ("Sum", "ux ve wh", "push"),
    ]:
        op(kind, inputs, output)
    op("Concat", "push h0 h1", "pushed", axis=1)
    for source, target in [("next", "next_sample"), ("clean", "x0"), ("pushed", "next_history")]:
        if conditional:
            op("Gather", f"{source} owner_row", target)
        else:
            op("Identity", source, target)

    image: list[str | int | None] = ["batch", *SHAPE]
    past: list[str | int | None] = ["batch", 3 * CHANNELS, SIDE, SIDE]
    floats, integers = TensorProto.FLOAT, TensorProto.INT64
    tensors: list[tuple[str, int, list[str | int | None]]] = [
        ("sample", floats, image),
        ("timestep", integers, ["batch"]),
        ("coefficients", floats, ["batch", width]),
    ]
    tensors += [("noise", floats, image), ("history", floats, past)]
    if conditional:
        tensors += [("class_labels", integers, ["batch"]), ("guidance", floats, ["batch"])]
        tensors += [("unconditional_row", integers, ["batch"]), ("owner_row", integers, ["batch"])]
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "step",
        [helper.make_tensor_value_info(*item) for item in tensors],
        [
            helper.make_tensor_value_info(name, floats, past if name == "next_history" else image)
            for name in ("next_sample", "x0", "next_history")
        ],
        [numpy_helper.from_array(value, name) for name, value in constants.items() if name in used],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    labels = LabelTable(input="class_labels", num_classes=CLASSES, null_label=NULL)
    denoiser = Denoiser(
        interface=StepInterface.of(
            SHAPE, [TensorSpec(name="class_labels", dtype="int64")] if conditional else (), coefficients=width
        ),
        num_train_timesteps=TIMESTEPS,
        learned_variance=learned,
        limits={"class_labels": CLASSES + 1} if conditional else {},
    )
    spec = PipelineSpec(name="tiny", components=(denoiser, labels) if conditional else (denoiser,))
    return Tiny(path, spec, weight, time_table, label_bias)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="session")
def plain(folder: Path) -> Tiny:
    return write_tiny(folder / "plain.onnx")


@pytest.fixture(scope="session")
def labelled(folder: Path) -> Tiny:
    return write_tiny(folder / "labelled.onnx", conditional=True)


@pytest.fixture(scope="session")
def learned(folder: Path) -> Tiny:
    return write_tiny(folder / "learned.onnx", learned=True)


@pytest.fixture(scope="session")
def arithmetic(folder: Path) -> Tiny:
    return write_tiny(folder / "arithmetic.onnx", arithmetic_time=True)


@pytest.fixture(params=["onnxruntime", "onnxruntime, throughput", "openvino", "openvino, throughput"])
def open_on(request: pytest.FixtureRequest) -> Callable[[Path], OnnxRuntimeSession | OpenVinoSession]:
    """Opens a step graph on each backend in turn, in float32."""

    def open_(graph: Path) -> OnnxRuntimeSession | OpenVinoSession:
        mode = "throughput" if request.param.endswith("throughput") else "latency"
        if request.param.startswith("openvino"):
            return OpenVinoSession(graph, threads=2, precision="f32", mode=mode)
        return OnnxRuntimeSession(graph, threads=2, mode=mode)

    return open_


@pytest.fixture(scope="session")
def make_table() -> Callable[..., StepTable]:
    schedule = NoiseSchedule.from_config(
        {
            "_class_name": "DDPMScheduler",
            "num_train_timesteps": TIMESTEPS,
            "beta_start": 0.001,
            "beta_end": 0.2,
            "beta_schedule": "linear",
            "prediction_type": "epsilon",
            "clip_sample": True,
            "clip_sample_range": 1.0,
            "variance_type": "fixed_small",
            "timestep_spacing": "leading",
        }
    )
    learned = NoiseSchedule.from_config(
        {
            "_class_name": "DDPMScheduler",
            "num_train_timesteps": TIMESTEPS,
            "beta_start": 0.001,
            "beta_end": 0.2,
            "beta_schedule": "linear",
            "prediction_type": "epsilon",
            "clip_sample": True,
            "variance_type": "learned_range",
        }
    )

    def make(sampler: str, steps: int, *, eta: float | None = None, learned_variance: bool = False) -> StepTable:
        return step_table(
            learned if learned_variance else schedule, sampler, steps, eta=eta, learned_variance=learned_variance
        )

    return make
