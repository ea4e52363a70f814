"""The step graph on ONNX Runtime's CPU provider: the backend that is always there."""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.artifacts.files import sha256_of
from qdm_deploy.errors import BundleError, EnvironmentProblem
from qdm_deploy.runtime.cpu import available_cores
from qdm_deploy.runtime.session import OUTPUTS, StepOutput, check_inputs, step_graph_inputs

__all__ = ["OnnxRuntimeSession"]

_DTYPES: dict[str, np.dtype[Any]] = {"tensor(float)": np.dtype(np.float32), "tensor(int64)": np.dtype(np.int64)}
_LOG_FATAL_ONLY = 4


class OnnxRuntimeSession:
    """A step graph loaded into ONNX Runtime.

    Args:
        graph: ONNX file of the step graph; external data beside it.
        threads: threads of one operator; None takes the cores this process may use.

    Raises:
        BundleError: the file is missing, damaged, not a step graph, or ONNX Runtime cannot load it.
        EnvironmentProblem: the onnxruntime package cannot be imported.
    """

    max_batch: int | None = None

    def __init__(self, graph: Path, *, threads: int | None = None) -> None:
        try:
            # Here, so that `doctor` and `--help` work without it and start fast.
            import onnxruntime as ort
        except ImportError as error:
            raise EnvironmentProblem(
                f"the onnxruntime backend cannot import its package ({error}): "
                "pip install --force-reinstall onnxruntime"
            ) from error
        self._version: str = ort.__version__
        self._threads = threads or available_cores()
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        # A U-Net is one chain of operators: a second pool for parallel branches only takes cores from the first.
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        # A failure arrives as an exception too; printing it once more would put two messages before the user.
        options.log_severity_level = _LOG_FATAL_ONLY
        if not graph.is_file():
            raise BundleError(f"the step graph {graph} does not exist; verify the bundle or build it again")
        try:
            session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's errors share no base class
            raise BundleError(
                f"ONNX Runtime {self._version} cannot load {graph}: {error}. Verify the bundle; if it is intact, it "
                "needs another version of ONNX Runtime or was built for another target."
            ) from error
        self._specs = step_graph_inputs(
            graph,
            [
                (item.name, _DTYPES.get(item.type), [axis if isinstance(axis, int) else None for axis in item.shape])
                for item in session.get_inputs()
            ],
            [item.name for item in session.get_outputs()],
        )
        self._session: Any = session
        self._graph_sha256 = sha256_of(graph)

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names that ``run`` wants, in the graph's order."""
        return tuple(spec.name for spec in self._specs)

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> StepOutput:
        """Run one step; ``StepSession.run`` says what it takes and raises. The result is in new arrays."""
        if self._session is None:
            raise ValueError("this OnnxRuntimeSession is closed")
        check_inputs(self._specs, inputs, self.max_batch)
        next_sample, x0 = self._session.run(OUTPUTS, dict(inputs))
        return StepOutput(next_sample, x0)

    def describe(self) -> dict[str, object]:
        """Backend, version, provider, threads, precision of the float part, hash of the graph."""
        return {
            "backend": "onnxruntime",
            "version": self._version,
            "provider": "CPUExecutionProvider",
            "threads": self._threads,
            "precision": "f32",
            "graph_sha256": self._graph_sha256,
        }

    def close(self) -> None:
        """Give back the backend's memory."""
        self._session = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
