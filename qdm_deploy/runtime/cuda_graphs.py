"""What a step queues on the GPU, recorded once per batch size and replayed.

A recording holds the addresses and sizes it was made with, so a batch size has a recording of its own, made by an
execution context of its own; it is made anew after anything it holds has changed (``forget``). Before the recording the
step runs once in the plain way: the library does its deferred work for a new shape then, which must not be recorded.

Source: TensorRT developer guide (CUDA graphs); CUDA Runtime API (graph management).
"""

from collections import OrderedDict
from collections.abc import Callable

from qdm_deploy.errors import QdmError
from qdm_deploy.runtime.cuda import CudaRuntime

__all__ = ["StepGraphs"]


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
        self._graphs: OrderedDict[int, int] = OrderedDict()

    def run(self, rows: int, queue: Callable[[], None]) -> None:
        """Queue one step of ``rows`` rows: the recording if there is one, else the step itself, and record it then.

        Args:
            rows: The batch size.
            queue: Queues the step's work on the stream; it is called again to record it.

        Raises:
            EngineError: The step cannot be recorded.
        """
        graph = self._graphs.get(rows)
        if graph is not None:
            self._graphs.move_to_end(rows)
            self._cuda.launch(graph, self._stream)
            return
        queue()
        self._cuda.synchronize(self._stream)
        while len(self._graphs) >= self._kept:
            self.forget(next(iter(self._graphs)))
        self._graphs[rows] = self._recorded(queue)

    def forget(self, rows: int) -> None:
        """Drop the recording of a batch size, if there is one: its next step is recorded anew."""
        graph = self._graphs.pop(rows, None)
        if graph is not None:
            self._cuda.synchronize(self._stream)  # it may still be running
            self._cuda.destroy_graph(graph)

    def close(self) -> None:
        """Drop every recording."""
        for rows in list(self._graphs):
            self.forget(rows)

    @property
    def recorded(self) -> tuple[int, ...]:
        """Batch sizes with a recording, least recently used first."""
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
