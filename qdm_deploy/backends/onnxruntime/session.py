"""The step graph on ONNX Runtime's CPU provider: the backend that is always there.

Two modes: for latency all threads work on one layer after the other; for throughput a batch is cut into parts
(``row_parts``), which run beside each other on a core or a few each, and what a layer leaves in a core's cache is read
by that core. A row has the same bits in both.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.artifacts.files import sha256_of
from qdm_deploy.artifacts.step_interface import DType
from qdm_deploy.errors import BundleError, EnvironmentProblem
from qdm_deploy.runtime.cpu import available_cores, saturates_int8
from qdm_deploy.runtime.row_parts import part_of, row_parts
from qdm_deploy.runtime.session import StepOutput, check_inputs, interface_of_graph

__all__ = ["OnnxRuntimeSession", "session_options"]

_DTYPES: dict[str, DType] = {"tensor(float)": "float32", "tensor(int64)": "int64"}
_LOG_FATAL_ONLY = 4
# Sessions with different numbers of threads, each of which holds the weights.
_KEPT_SESSIONS = 2


class OnnxRuntimeSession:
    """A step graph loaded into ONNX Runtime.

    Args:
        graph: ONNX file of the step graph; external data beside it.
        threads: threads of one operator; None takes the cores this process may use.
        mode: ``"latency"``, or ``"throughput"``, which cuts a batch into parts where its rows allow that.

    Raises:
        BundleError: the file is missing, damaged, not a step graph, or ONNX Runtime cannot load it.
        EnvironmentProblem: the onnxruntime package cannot be imported.
    """

    max_batch: int | None = None

    def __init__(
        self, graph: Path, *, threads: int | None = None, mode: Literal["latency", "throughput"] = "latency"
    ) -> None:
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
        if not graph.is_file():
            raise BundleError(f"the step graph {graph} does not exist; verify the bundle or build it again")
        self._ort, self._graph, self._mode = ort, graph, mode
        # By threads, the last one used at the end: parts share a session of few, a whole batch needs one of all.
        self._sessions: OrderedDict[int, Any] = OrderedDict()
        self._ran: set[int] = set()
        self._cores = self._threads if mode == "throughput" else 1  # that take parts of their own
        self._pool = ThreadPoolExecutor(self._cores, "onnxruntime-lane") if self._cores > 1 else None
        first = 1 if self._pool is not None else self._threads
        session = self._sessions[first] = self._opened(first)
        inputs, outputs = (
            [
                (item.name, _DTYPES.get(item.type), [axis if isinstance(axis, int) else None for axis in item.shape])
                for item in items
            ]
            for items in (session.get_inputs(), session.get_outputs())
        )
        self.interface = interface_of_graph(graph, inputs, outputs)
        self._outputs = list(StepOutput.__dataclass_fields__)
        self._graph_sha256 = sha256_of(graph)
        self._closed = False

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> StepOutput:
        """Run one step; ``StepSession.run`` says what it takes and raises. The result is in new arrays."""
        if self._closed:
            raise ValueError("this OnnxRuntimeSession is closed")
        rows = check_inputs(self.interface, inputs, self.max_batch)
        parts = row_parts(inputs, rows, self._cores)
        if self._pool is None or len(parts) == 1:
            return StepOutput(*self._session(self._threads).run(self._outputs, dict(inputs)))
        lanes = min(len(parts), self._cores)
        session = self._session(self._cores // lanes)
        joined = [np.empty((rows, *self.interface[name].row_shape), np.float32) for name in self._outputs]

        def lane(own: Sequence[slice]) -> None:
            for part in own:
                for place, values in zip(joined, session.run(self._outputs, part_of(inputs, part)), strict=True):
                    place[part] = values

        # All of them end before an error is raised: nothing may go on reading the inputs.
        running = [self._pool.submit(lane, parts[number::lanes]) for number in range(lanes)]
        for error in [future.exception() for future in running]:
            if error is not None:
                raise error
        return StepOutput(*joined)

    def describe(self) -> dict[str, object]:
        """Backend, version, provider, threads, precision of the float part, hash of the graph."""
        return {
            "backend": "onnxruntime",
            "version": self._version,
            "provider": "CPUExecutionProvider",
            "threads": self._threads,
            "mode": self._mode,
            "precision": "f32",
            "graph_sha256": self._graph_sha256,
        }

    def close(self) -> None:
        """Give back the backend's memory."""
        self._closed = True
        self._sessions.clear()
        if self._pool is not None:
            self._pool.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _session(self, threads: int) -> Any:
        """One that will run; it takes the place of one that never did, or of the one that did longest ago."""
        if threads not in self._sessions:
            for idle in self._sessions.keys() - self._ran:
                del self._sessions[idle]
            while len(self._sessions) >= _KEPT_SESSIONS:
                self._sessions.popitem(last=False)
            self._sessions[threads] = self._opened(threads)
        self._ran.add(threads)
        self._sessions.move_to_end(threads)
        return self._sessions[threads]

    def _opened(self, threads: int) -> Any:
        options = session_options()
        options.intra_op_num_threads = threads
        # A U-Net is one chain of operators: a second pool for parallel branches only takes cores from the first.
        options.inter_op_num_threads = 1
        options.execution_mode = self._ort.ExecutionMode.ORT_SEQUENTIAL
        try:
            return self._ort.InferenceSession(self._graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's errors share no base class
            raise BundleError(
                f"ONNX Runtime {self._version} cannot load {self._graph}: {error}. Verify the bundle; if it is "
                "intact, it needs another version of ONNX Runtime or was built for another target."
            ) from error


def session_options() -> Any:
    """ONNX Runtime's options for a graph with integer products, which come out exact on this CPU."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    # A failure arrives as an exception too; printing it once more would put two messages before the user.
    options.log_severity_level = _LOG_FATAL_ONLY
    if saturates_int8():
        # Weights become u8: products of two u8 are added in 32 bits on every CPU.
        options.add_session_config_entry("session.x64quantprecision", "1")
    return options
