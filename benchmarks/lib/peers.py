"""Other quantizers and runtimes on our float model and calibration rows: what a user would run instead of ours."""

import io
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir
from lib.case import Case, write_exported, write_float
from lib.contest import Contender, Missing
from lib.sessions import Opening
from numpy.typing import NDArray
from onnxruntime.quantization import (  # noqa: TID251 - the peer that is measured
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)

from qdm_calibration.modelopt import modelopt_network
from qdm_deploy.artifacts.calibration_set import CalibrationSet
from qdm_deploy.artifacts.pipeline_spec import Denoiser
from qdm_deploy.backends import OnnxRuntimeSession
from qdm_deploy.backends.openvino.graph import import_openvino
from qdm_deploy.building.simulation import TorchSession
from qdm_deploy.components.sampling import table_for
from qdm_deploy.samplers import StepTable
from qdm_deploy.samplers.random_inputs import random_inputs
from qdm_export.step_graph import StepGraph
from qdm_export.topology import MODULE_KEY

# The sampler that the rows were met with, as in case().
CALIBRATION_STEPS = 50
# Bytes beyond which a graph cannot hold its weights.
_PROTOBUF_LIMIT = 2**31
# Rows at once: with percentiles `quantize_static` holds the inputs and outputs of all layers of what it reads in one
# go, 15 MB a row of the embedded model.
BATCH = 16


class Rows(CalibrationDataReader):  # type: ignore[misc]
    """The calibration rows as inputs of the step graph, ``BATCH`` at a time; it counts and is cut in batches."""

    def __init__(
        self, calibration: CalibrationSet, denoiser: Denoiser, table: StepTable, names: tuple[str, ...]
    ) -> None:
        """Start at the first row; ``names`` are the graph's inputs."""
        self.calibration, self.denoiser, self.table, self.names = calibration, denoiser, table, names
        self.starts = range(0, len(calibration), BATCH)
        self.set_range(0, len(self))

    def __len__(self) -> int:
        """Batches in all."""
        return len(self.starts)

    def set_range(self, start_index: int, end_index: int) -> None:
        """Go on with these batches: `quantize_static` calls it for every stride of `CalibStridedMinMax`."""
        self.left = iter(self.starts[start_index:end_index])

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        """The next rows; None at the end."""
        start = next(self.left, None)
        if start is None:
            return None
        rows = slice(start, start + BATCH)
        inputs = random_inputs(self.denoiser, len(self.calibration.sample[rows])) | {
            "sample": self.calibration.sample[rows],
            "timestep": self.calibration.timestep[rows],
            "coefficients": self.table.coefficients[self.calibration.step[rows]],
            **{name: values[rows] for name, values in self.calibration.conditioning.items()},
        }
        return {name: inputs[name] for name in self.names}


def rows_for(model: Case, source: Path) -> Rows:
    """The rows as a graph wants them."""
    with OnnxRuntimeSession(source) as session:
        table = table_for(model.checkpoint.denoiser, model.schedule, "ddim", CALIBRATION_STEPS)
        return Rows(model.calibration, model.checkpoint.denoiser, table, session.interface.input_names)


def quantized_static(model: Case, source: Path, method: CalibrationMethod = CalibrationMethod.MinMax) -> Path:
    """A float step graph through ONNX Runtime's own quantization: `static.onnx` beside it."""
    # It prints its progress, and standard output belongs to the result.
    with redirect_stdout(io.StringIO()):
        quantize_static(
            source,
            source.with_name("static.onnx"),
            rows_for(model, source),
            quant_format=QuantFormat.QDQ,
            # The sampler's own products and sums stay float: a bound of x0 that is switched off is a huge number, and
            # one scale for it and for what it bounds would leave nothing.
            op_types_to_quantize=["Conv", "MatMul", "Gemm"],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=method,
            use_external_data_format=(source.parent / "float.data").stat().st_size >= _PROTOBUF_LIMIT,
            # One batch after the other for every method, whatever the name says: without it percentiles read all
            # rows in one go (6 GB for 416).
            extra_options={"CalibStridedMinMax": 1},
        )
    return source.with_name("static.onnx")


def modelopt_session(model: Case, config: str) -> TorchSession:
    """ModelOpt's own fake-quantized network, with all its layers."""
    network = modelopt_network(model.checkpoint.unet, model.calibration, config)
    return TorchSession(StepGraph(network, model.checkpoint.denoiser).eval(), config)


def peers(model: Case, folder: Path) -> dict[str, Contender]:
    """PyTorch in several forms, ONNX Runtime's own INT8, NNCF's INT8 on OpenVINO; made ready in ``folder``."""

    def static(write: Callable[[Case, Path], Path], name: str) -> Opening:
        return Opening("onnxruntime", quantized_static(model, write(model, folder / name)), {})

    def in_torch(form: str) -> Opening:
        return Opening("torch", Path(model.name), {"form": form})

    return {
        "quantize_static INT8": Contender(partial(static, write_exported, "static")),
        "quantize_static INT8, our float graph": Contender(partial(static, write_float, "static-on-ours")),
        "NNCF INT8": Contender(partial(_nncf, model, folder / "nncf", "latency")),
        "NNCF INT8, throughput": Contender(partial(_nncf, model, folder / "nncf", "throughput")),
        "torch eager FP32": Contender(partial(in_torch, "eager FP32")),
        "torch.compile FP32": Contender(partial(in_torch, "compile FP32")),
    }


def _nncf(model: Case, folder: Path, mode: Literal["latency", "throughput"]) -> Opening:
    """NNCF's post-training quantization, mixed preset, on the calibration rows that ours has."""
    if find_spec("nncf") is None:
        raise Missing("pip install nncf")
    source, result = folder / "float.onnx", folder / "nncf.xml"
    if not result.exists():
        ov = import_openvino()
        import nncf

        rows = rows_for(model, write_exported(model, folder))
        quantized = nncf.quantize(
            ov.Core().read_model(source),
            nncf.Dataset(list(iter(rows.get_next, None))),
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(rows),
            # The sampler's update stays float, as in the other peers. Some of its nodes OpenVINO folds away as it
            # reads.
            ignored_scope=nncf.IgnoredScope(names=_sampler_nodes(model), validate=False),
        )
        ov.save_model(quantized, result, compress_to_fp16=False)
    return Opening("nncf", source, {"mode": mode})


def _sampler_nodes(model: Case) -> list[str]:
    """Names of the step graph's nodes that are no part of the U-Net: those that its last layer does not depend on."""
    inside: set[ir.Node] = set()
    waiting = [[node for node in model.graph.graph if MODULE_KEY in node.metadata_props][-1]]
    while waiting:
        node = waiting.pop()
        if node not in inside:
            inside.add(node)
            producers = [value.producer() for value in node.inputs if value is not None]
            waiting += [producer for producer in producers if producer is not None]
    return [node.name for node in model.graph.graph if node not in inside and node.name is not None]
