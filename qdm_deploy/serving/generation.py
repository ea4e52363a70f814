"""A request that was admitted, as its caller sees it: previews, one outcome, cancellation."""

import asyncio
from collections.abc import AsyncIterator, Callable

from qdm_deploy.serving.contract import Finished, GenerationFailed, GenerationRequest, Preview

__all__ = ["LiveGeneration"]


class LiveGeneration:
    """The engine's record of a request; what only the engine may touch is named so.

    Args:
        request: what was asked for.
        rows_each: rows of one image.
        submitted: when, on ``time.monotonic``.
        cancel: told to end it.
    """

    def __init__(
        self,
        request: GenerationRequest,
        rows_each: int,
        submitted: float,
        cancel: Callable[["LiveGeneration"], None],
    ) -> None:
        self.request = request
        self.rows_each = rows_each
        self.submitted = submitted
        self.started: float | None = None
        self.timer: asyncio.TimerHandle | None = None
        self._cancel = cancel
        self._outcome: asyncio.Future[Finished] = asyncio.get_running_loop().create_future()
        # Nobody may wait for the result, and asyncio complains of errors that nobody looked at.
        self._outcome.add_done_callback(lambda future: future.exception())
        self._previews: list[Preview] = []
        self._changed = asyncio.Event()

    @property
    def ended(self) -> bool:
        """Whether it has its outcome."""
        return self._outcome.done()

    async def previews(self) -> AsyncIterator[Preview]:
        """The previews from the first one on, as they come."""
        seen = 0
        while True:
            while seen < len(self._previews):
                yield self._previews[seen]
                seen += 1
            if self.ended:
                return
            self._changed.clear()
            await self._changed.wait()

    async def result(self) -> Finished:
        """Wait for the images.

        Raises:
            GenerationFailed: the request ended in another way.
        """
        # A waiter that is cancelled must not take the outcome from the others.
        return await asyncio.shield(self._outcome)

    def cancel(self) -> None:
        """Give the request's rows back within one step; a request that has ended stays as it is."""
        if not self.ended:
            self._cancel(self)

    def show(self, preview: Preview) -> None:
        """For the engine: a preview has come."""
        self._previews.append(preview)
        self._changed.set()

    def end(self, outcome: Finished | GenerationFailed) -> None:
        """For the engine: the one outcome."""
        if self.timer is not None:
            self.timer.cancel()
        if isinstance(outcome, Finished):
            self._outcome.set_result(outcome)
        else:
            self._outcome.set_exception(outcome)
        self._changed.set()
