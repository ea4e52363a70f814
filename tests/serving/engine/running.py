"""A running engine for a test, and what happened to it."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from qdm_deploy.serving import ProcessEngine, RestartPolicy
from qdm_deploy.serving.contract import GenerationFailed, GenerationRequest
from tests.runtime.conftest import NULL as LINEAR_NULL
from tests.serving.engine.fake import labels

FAULTY = (str(Path(__file__).with_name("faulty_child.py")),)


class Recorder:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int]] = []
        self.refusals: list[str] = []
        self.outcomes: list[tuple[str, int]] = []
        self.restarts = 0

    def stepped(self, rows: int, padding_rows: int, seconds: float) -> None:
        assert seconds > 0
        self.steps.append((rows, padding_rows))

    def refused(self, reason: str) -> None:
        self.refusals.append(reason)

    def ended(self, outcome: str, images: int, queue_seconds: float, seconds: float) -> None:
        assert 0 <= queue_seconds <= seconds
        self.outcomes.append((outcome, images))

    def restarted(self) -> None:
        self.restarts += 1


@asynccontextmanager
async def started(
    bundle: Path, *, faulty: bool = False, **options: Any
) -> AsyncIterator[tuple[ProcessEngine, Recorder]]:
    chosen = {
        "backend": "onnxruntime",
        "threads": 1,
        "max_rows": 4,
        "restarts": RestartPolicy(first_wait=0.05),
        **options,
    }
    engine = ProcessEngine(bundle, **chosen)
    if faulty:
        engine._program = FAULTY
    recorder = Recorder()
    engine.add_observer(recorder)
    try:
        await engine.start()
        yield engine, recorder
    finally:
        await engine.close()


def request(name: str, images: int = 1, label: int = 0, **fields: Any) -> GenerationRequest:
    return GenerationRequest(
        name, tuple(range(images)), conditioning=labels((label,) * images, LINEAR_NULL), **{"steps": 5, **fields}
    )


async def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


async def outcome(generation: Any) -> str:
    """ "finished", or the reason of its failure."""
    try:
        async with asyncio.timeout(60):
            await generation.result()
    except GenerationFailed as failure:
        return failure.reason
    return "finished"


def run(body: Coroutine[Any, Any, None]) -> None:
    asyncio.run(body)
