"""The step graph on OpenVINO's CPU plugin: the fastest path on x86 without a GPU.

A graph of dynamic batch runs 1.4 to 2 times slower than the same graph reshaped to one batch size, so the session
compiles the graph once for each batch size it meets (some seconds each) and keeps the last few. A graph of a bundle
is compiled once per machine: ``CompiledGraphs`` keeps the result on disk.

Two modes: for latency all cores work on one batch; for throughput the batch is cut into parts (``row_parts``), which
run beside each other on a share of the cores each and wait for each other once per step instead of once per layer.
"""

import contextlib
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.artifacts.files import sha256_of
from qdm_deploy.artifacts.step_interface import DType, StepInterface
from qdm_deploy.backends.openvino.compiled_graphs import CompiledGraphs
from qdm_deploy.backends.openvino.graph import (
    compile_graph,
    import_openvino,
    largest_activation,
    read_graph,
    without_bfloat16,
)
from qdm_deploy.backends.openvino.precision import choose_precision, keep_float32
from qdm_deploy.backends.openvino.weights import keep_weights_exact
from qdm_deploy.errors import BundleError
from qdm_deploy.runtime.cpu import available_cores, cpu_flags, cpu_model, saturates_int8
from qdm_deploy.runtime.row_parts import SMALL, part_of, row_parts
from qdm_deploy.runtime.session import StepOutput, check_inputs, interface_of_graph

__all__ = ["KEPT_BATCH_SIZES", "OpenVinoSession"]

_DTYPES: dict[str, DType] = {"f32": "float32", "i64": "int64"}
KEPT_BATCH_SIZES = 4
# A part may be this large in its largest activation (docs/adr/0014).
_SMALL_BYTES = 8 * 2**20


class OpenVinoSession:
    """A step graph loaded into OpenVINO.

    Args:
        graph: ONNX file of the step graph; external data beside it.
        threads: threads of the session; None takes the cores this process may use.
        precision: precision of what is not INT8. ``"auto"`` takes bf16 where the CPU multiplies bf16 matrices (AMX) and
            the graph keeps the timestep exact in it; ``describe()`` says what was taken and why. The sampler's
            update stays float32 in both.
        mode: ``"latency"``, or ``"throughput"``, which cuts a batch into parts where its rows allow that. Each part is
            a batch of its own, so bits may differ between the modes as they do between batch sizes.
        kept_batch_sizes: compiled graphs that are kept, the last ones used; each holds its own copy of the weights.
        identity: names graph and weights, such as a bundle's id: compiled graphs are then kept on disk under it; None
            keeps none there.

    Raises:
        BundleError: the file is missing, damaged, not a step graph, or OpenVINO cannot load it.
        EnvironmentProblem: the openvino package is missing.
    """

    max_batch: int | None = None

    def __init__(
        self,
        graph: Path,
        *,
        threads: int | None = None,
        precision: Literal["bf16", "f32", "auto"] = "auto",
        mode: Literal["latency", "throughput"] = "latency",
        kept_batch_sizes: int = KEPT_BATCH_SIZES,
        identity: str | None = None,
    ) -> None:
        ov = import_openvino()
        if not graph.is_file():
            raise BundleError(f"the step graph {graph} does not exist; verify the bundle or build it again")
        self._graph = graph
        self._version: str = ov.__version__
        self._threads = threads or available_cores()
        self._core = ov.Core()
        try:
            self._model = read_graph(graph, cpu_flags())
        except Exception as error:  # the reader's errors share no base class
            raise self._load_error(error) from error
        inputs, outputs = (
            [
                (
                    item.any_name,
                    _DTYPES.get(item.element_type.get_type_name()),
                    [axis.get_length() if axis.is_static else None for axis in item.partial_shape],
                )
                for item in items
            ]
            for items in (self._model.inputs, self._model.outputs)
        )
        self.interface = interface_of_graph(graph, inputs, outputs)
        self._precision, self._reason = choose_precision(precision, cpu_flags())
        self._exact_weights = self._kept_float32 = 0
        if self._precision == "bf16":
            without_bfloat16(self._model)  # the graph's own casts: under the hint they copy bfloat16 to bfloat16
            self._exact_weights = keep_weights_exact(self._model)
            self._kept_float32 = keep_float32(self._model)
        self._cores = self._threads if mode == "throughput" else 1  # that take parts of their own
        # Without its low-precision transformations OpenVINO 2026.4 sometimes compiles two streams wrong: one in about
        # eight sessions computed noise. Such a CPU takes the parts one after the other.
        self._streams = 1 if saturates_int8() else self._cores
        self._mode = mode
        self._small = SMALL
        if self._cores > 1:
            self._small = max(SMALL, _SMALL_BYTES // max(largest_activation(self._model), 1))
        self._runners: OrderedDict[tuple[int, int], _Runner] = OrderedDict()  # by rows and parts
        self._graph_sha256 = sha256_of(graph)
        self._kept_batch_sizes = kept_batch_sizes
        self._options = {
            "INFERENCE_PRECISION_HINT": self._precision,
            # The hint does not matter where the number of streams is given.
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": self._threads,
            # Two pinned sessions on one machine would pin themselves to the same cores.
            "ENABLE_CPU_PINNING": False,
        }
        self._compiled = None if identity is None else CompiledGraphs(self._compiled_identity(identity))
        self._closed = False

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> StepOutput:
        """Run one step; ``StepSession.run`` says what it takes and raises. The next step overwrites the result.

        Raises:
            BundleError: OpenVINO cannot compile the graph for this number of rows.
        """
        if self._closed:
            raise ValueError("this OpenVinoSession is closed")
        rows = check_inputs(self.interface, inputs, self.max_batch)
        parts = row_parts(inputs, rows, self._cores, self._small)
        return self._runner(rows, len(parts)).run(inputs, parts)

    def describe(self) -> dict[str, object]:
        """Backend, version, device, threads, precision of the float part with its reason, hash of the graph."""
        return {
            "backend": "openvino",
            "version": self._version,
            "device": "CPU",
            "threads": self._threads,
            "mode": self._mode,
            "precision": self._precision,
            "precision_reason": self._reason,
            "graph_sha256": self._graph_sha256,
        }

    def close(self) -> None:
        """Give back the backend's memory."""
        self._closed = True
        self._runners.clear()
        self._model = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _runner(self, rows: int, parts: int) -> "_Runner":
        key = rows, parts
        if key in self._runners:
            self._runners.move_to_end(key)
            return self._runners[key]
        try:
            runner = _Runner(self._compiled_for(rows // parts, min(self._streams, parts)), self.interface, parts)
        except Exception as error:
            raise self._load_error(error) from error
        if len(self._runners) == self._kept_batch_sizes:
            self._runners.popitem(last=False)
        self._runners[key] = runner
        return runner

    def _compiled_for(self, rows: int, streams: int) -> Any:
        """From the disk where it is there and still fits this OpenVINO, else compiled now."""
        options = {**self._options, "NUM_STREAMS": streams}
        blob = self._compiled.load(rows, streams) if self._compiled else None
        if blob is not None:
            with contextlib.suppress(RuntimeError):
                return self._core.import_model(blob, "CPU", options)
        model = self._model.clone()
        model.reshape({spec.name: [rows, *spec.row_shape] for spec in self.interface})
        compiled = compile_graph(self._core, model, options)
        if self._compiled:
            self._compiled.store(rows, streams, compiled.export_model().getvalue())
        return compiled

    def _compiled_identity(self, graph: str) -> dict[str, object]:
        return {
            "graph": graph,
            "version": self._version,
            "cpu": [cpu_model(), *sorted(cpu_flags())],
            "options": self._options,
            "kept in float32": self._kept_float32,
            "weights kept exact": self._exact_weights,
        }

    def _load_error(self, error: Exception) -> BundleError:
        return BundleError(
            f"OpenVINO {self._version} cannot load {self._graph}: {error}. Verify the bundle; if it is intact, "
            "it needs another version of OpenVINO or was built for another target."
        )


class _Runner:
    """A graph compiled for one size of part, and a request for each part of a batch.

    Every request reads and writes memory that is bound to it once: binding a step's arrays anew takes OpenVINO's Python
    longer than copying them.
    """

    def __init__(self, compiled: Any, interface: StepInterface, parts: int) -> None:
        self._requests = [compiled.create_infer_request() for _ in range(parts)]
        self._inputs: list[dict[str, NDArray[Any]]] = []  # of each request
        self._results: dict[str, NDArray[np.float32]] = {}  # of all of them, side by side
        tensor = import_openvino().Tensor
        for request in self._requests:
            own = {spec.name: np.empty(list(compiled.input(spec.name).shape), spec.numpy_dtype) for spec in interface}
            for name, values in own.items():
                request.set_tensor(name, tensor(values, shared_memory=True))
            self._inputs.append(own)
        for name in StepOutput.__dataclass_fields__:
            rows, *shape = compiled.output(name).shape
            self._results[name] = np.empty((parts * rows, *shape), dtype=np.float32)
            for part, request in enumerate(self._requests):
                place = self._results[name][part * rows : (part + 1) * rows]
                request.set_tensor(name, tensor(place, shared_memory=True))

    def run(self, inputs: Mapping[str, NDArray[Any]], parts: list[slice]) -> StepOutput:
        """One step of the whole batch."""
        for request, own, part in zip(self._requests, self._inputs, parts, strict=True):
            for name, values in part_of(inputs, part).items():
                np.copyto(own[name], values)
            request.start_async()
        for request in self._requests:
            request.wait()
        return StepOutput(**self._results)
