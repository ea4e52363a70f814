"""What a step queues on the GPU, recorded once per batch size and replayed.

A recording holds the addresses and sizes it was made with, so a batch size has a recording of its own, made by an
execution context of its own; it is made anew after anything it holds has changed (``forget``). Before the recording the
step runs once in the plain way: the library does its deferred work for a new shape then, which must not be recorded.
A step that cannot be recorded goes on running in the plain way, which costs launches and nothing else.

Source: TensorRT developer guide (CUDA graphs); CUDA Runtime API (graph management).
"""

import logging
from collections import OrderedDict
from collections.abc import Callable

from qdm_deploy.backends.tensorrt.cuda import CudaRuntime
from qdm_deploy.errors import QdmError

__all__ = ["StepGraphs"]

_LOG = logging.getLogger(__name__)


class StepGraphs:
    """Recordings by batch size, the least recently used going first.

    Args:
        cuda: The CUDA functions.
        stream: The session's stream.
        kept: How many recordings live at once.
    """

    def __init__(self, cuda: CudaRuntime, stream: int, kept: int) -> None:
        self._cuda = cuda
        self._stream = stream
        self._kept = kept
        self._graphs: OrderedDict[int, int | None] = OrderedDict()  # None: it cannot be recorded
        self.refusal: str | None = None  # why a step could not be recorded, the last time

    def run(self, rows: int, queue: Callable[[], None]) -> None:
        """Queue one step of ``rows`` rows: the recording if there is one, else the step itself, and record it then.

        Args:
            rows: The batch size.
            queue: Queues the step's work on the stream; it is called again to record it.

        Raises:
            EngineError: The step cannot be queued.
        """
        if rows in self._graphs:
            self._graphs.move_to_end(rows)
            graph = self._graphs[rows]
            if graph is None:
                queue()
            else:
                self._cuda.launch(graph, self._stream)
            return
        queue()
        self._cuda.synchronize(self._stream)
        while len(self._graphs) >= self._kept:
            self.forget(next(iter(self._graphs)))
        try:
            self._graphs[rows] = self._recorded(queue)
        except QdmError as error:
            self._graphs[rows], self.refusal = None, str(error)
            _LOG.warning("steps of %d rows run without a CUDA graph: %s", rows, error)

    def forget(self, rows: int) -> None:
        """Drop the recording of a batch size, if there is one: its next step is recorded anew."""
        if rows not in self._graphs:
            return
        graph = self._graphs.pop(rows)
        self._cuda.synchronize(self._stream)  # it may still be running
        if graph is not None:
            self._cuda.destroy_graph(graph)

    def close(self) -> None:
        """Drop every recording."""
        for rows in list(self._graphs):
            self.forget(rows)

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Batch sizes that are kept, least recently used first."""
        return tuple(self._graphs)

    def _recorded(self, queue: Callable[[], None]) -> int:
        self._cuda.begin_capture(self._stream)
        try:
            queue()
        except BaseException:
            # Ended in any case: a stream that goes on recording runs nothing any more.
            self._discard_capture()
            raise
        return self._cuda.end_capture(self._stream)

    def _discard_capture(self) -> None:
        try:
            graph = self._cuda.end_capture(self._stream)
        except QdmError:
            return  # the failure made the recording invalid, and ending it says so
        self._cuda.destroy_graph(graph)
