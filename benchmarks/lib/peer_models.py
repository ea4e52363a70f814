"""Other quantizers on our float model and calibration rows: NVIDIA's ModelOpt, and ONNX Runtime's `quantize_static`."""

import io
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
from lib.bench import Case, write_float
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
from qdm_deploy.backends import OnnxRuntimeSession
from qdm_deploy.building.simulation import TorchSession
from qdm_deploy.samplers import StepTable, step_table
from qdm_export.step_graph import StepGraph

__all__ = ["CALIBRATION_STEPS", "CalibrationMethod", "Rows", "modelopt_session", "quantized_static"]

# The sampler that the rows were met with, as in bench.case.
CALIBRATION_STEPS = 50
# Bytes beyond which a graph cannot hold its weights.
_PROTOBUF_LIMIT = 2**31
# Rows at once: with percentiles `quantize_static` holds the inputs and outputs of all layers of what it reads in one
# go, 15 MB a row of the embedded model.
BATCH = 16


class Rows(CalibrationDataReader):  # type: ignore[misc]
    """The calibration rows as inputs of the step graph, ``BATCH`` at a time; it counts and is cut in batches."""

    def __init__(self, calibration: CalibrationSet, table: StepTable, names: tuple[str, ...]) -> None:
        """Start at the first row; ``names`` are the graph's inputs."""
        self.calibration, self.table, self.names = calibration, table, names
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
        sample = self.calibration.sample[rows]
        alone = np.arange(len(sample), dtype=np.int64)
        inputs = {
            "sample": sample,
            "timestep": self.calibration.timestep[rows],
            "coefficients": self.table.coefficients[self.calibration.step[rows]],
            "noise": np.zeros_like(sample),
            "previous_x0": np.zeros_like(sample),
            "guidance": np.ones(len(sample), dtype=np.float32),
            "unconditional_row": alone,
            "owner_row": alone,
            **{name: values[rows] for name, values in self.calibration.conditioning.items()},
        }
        return {name: inputs[name] for name in self.names}


def quantized_static(
    model: Case, method: CalibrationMethod, folder: Path, source: Path | None = None
) -> OnnxRuntimeSession:
    """A float step graph through ONNX Runtime's own quantization; ``folder`` must live as long as the session.

    ``source`` is the graph; None takes the bundle's, whose normalizations ONNX Runtime runs faster than the exporter's.
    The result is ``static.onnx`` in the folder.
    """
    source = source or write_float(model, folder)
    with OnnxRuntimeSession(source) as session:
        names = session.input_names
    table = step_table(model.schedule, "ddim", CALIBRATION_STEPS)
    # It prints its progress, and standard output belongs to the result.
    with redirect_stdout(io.StringIO()):
        quantize_static(
            source,
            folder / "static.onnx",
            Rows(model.calibration, table, names),
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
    return OnnxRuntimeSession(folder / "static.onnx")


def modelopt_session(model: Case, config: str) -> TorchSession:
    """ModelOpt's own fake-quantized network, with all its layers."""
    network = modelopt_network(model.checkpoint.unet, model.calibration, config)
    return TorchSession(StepGraph(network, model.checkpoint.spec).eval(), config)
