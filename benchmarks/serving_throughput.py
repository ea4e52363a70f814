"""Continuous batching beside one image at a time and beside static batches of 8: throughput and latency.

The embedded model on one backend, one image a request. Closed loop: so many clients, each waits for its image, then for
an exponential pause, then asks again; they start staggered as well. Open loop: Poisson arrivals at a rate that keeps
about 8 requests inside, whatever the answers. The three ways meet the same arrivals, in turn, in the same run:

- continuous: the engine as ``serve`` starts it, 8 rows;
- one at a time: the engine with one row, all threads on it;
- static: batches of up to 8 of those who wait, the next one when the last image of this one is done; it runs on the
  engine of the first way, so that only the batching differs.

    python benchmarks/serving_throughput.py --bundle demo/fashion.qdm --save
"""

import asyncio
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from lib.bench import finish, parser, say

from qdm_deploy.pipeline import BuildOptions, build
from qdm_deploy.serving import ProcessEngine
from qdm_deploy.serving.contract import FailureReason, GenerationRequest, RefusalReason

ROWS = 8
COLUMNS = ["load", "way", "images_per_s", "median_s", "p95_s", "batch_rows", "over one at a time"]

Generate = Callable[[GenerationRequest], Awaitable[None]]


@dataclass
class Rows:
    """An observer that counts rows and steps, for the effective batch size."""

    rows: int = 0
    steps: int = 0

    def stepped(self, rows: int, padding_rows: int, seconds: float) -> None:
        """Count it."""
        self.rows += rows
        self.steps += 1

    def refused(self, reason: RefusalReason) -> None:
        """Nothing may be refused here."""
        raise RuntimeError(f"a request was refused: {reason}")

    def ended(self, outcome: str | FailureReason, images: int, queue_seconds: float, seconds: float) -> None:
        """Latencies are taken where they are felt."""

    def restarted(self) -> None:
        """Nothing may die here."""
        raise RuntimeError("the engine process died")


@dataclass
class Measured:
    """What one way did under one load, over all rounds."""

    latencies: list[float] = field(default_factory=list)
    seconds: float = 0.0
    rows: int = 0
    steps: int = 0

    def row(self, load: str, way: str) -> dict[str, Any]:
        """The line of the table."""
        latencies = sorted(self.latencies)
        return {
            "load": load,
            "way": way,
            "images_per_s": len(latencies) / self.seconds,
            "median_s": statistics.median(latencies),
            "p95_s": latencies[min(int(0.95 * len(latencies)), len(latencies) - 1)],
            "batch_rows": self.rows / self.steps,
            "images": len(latencies),
        }


def straight(engine: ProcessEngine) -> Generate:
    async def generate(request: GenerationRequest) -> None:
        await engine.submit(request).result()

    return generate


class Static:
    """Takes up to ``ROWS`` of those who wait, runs them to the end, and only then takes the next."""

    def __init__(self, engine: ProcessEngine) -> None:
        self._engine = engine
        self._waiting: list[tuple[GenerationRequest, asyncio.Future[None]]] = []
        self._task: asyncio.Task[None] | None = None

    async def generate(self, request: GenerationRequest) -> None:
        """Wait for the image, with those it shares a batch with."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, done))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        await done

    async def _run(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting[:ROWS], self._waiting[ROWS:]
            await asyncio.gather(*(self._engine.submit(request).result() for request, _ in batch))
            for _, done in batch:
                done.set_result(None)


class Load:
    """Requests of one kind of arrival; the same ones for every way."""

    def __init__(self, steps: tuple[int, ...], classes: int, images: int, pause: float) -> None:
        self._steps, self._classes, self._images, self._pause = steps, classes, images, pause

    def _request(self, index: int, chance: np.random.Generator) -> GenerationRequest:
        return GenerationRequest(
            f"r{index}", (index,), steps=int(chance.choice(self._steps)), class_labels=(index % self._classes,)
        )

    async def closed(self, generate: Generate, clients: int, seed: int) -> tuple[list[float], float]:
        """Latencies and wall time of so many clients that ask again when they have their image."""
        latencies: list[float] = []
        asked = 0

        async def client(number: int) -> None:
            nonlocal asked
            chance = np.random.default_rng([seed, number])
            await asyncio.sleep(chance.exponential(self._pause * clients))
            while asked < self._images:
                asked += 1
                start = time.perf_counter()
                await generate(self._request(asked, chance))
                latencies.append(time.perf_counter() - start)
                await asyncio.sleep(chance.exponential(self._pause))

        start = time.perf_counter()
        await asyncio.gather(*(client(number) for number in range(clients)))
        return latencies, time.perf_counter() - start

    async def open(self, generate: Generate, rate: float, seed: int) -> tuple[list[float], float]:
        """Latencies and wall time of Poisson arrivals at ``rate`` a second."""
        latencies: list[float] = []
        chance = np.random.default_rng(seed)

        async def one(request: GenerationRequest) -> None:
            start = time.perf_counter()
            await generate(request)
            latencies.append(time.perf_counter() - start)

        start = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for index in range(self._images):
                await asyncio.sleep(chance.exponential(1 / rate))
                group.create_task(one(self._request(index, chance)))
        return latencies, time.perf_counter() - start


async def measure(given: Any, bundle: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    common: dict[str, Any] = {"backend": given.backend, "threads": given.threads, "max_waiting": 10_000}
    batching = ProcessEngine(bundle, max_rows=ROWS, **common)
    single = ProcessEngine(bundle, max_rows=1, **common)
    counted: dict[str, Rows] = {}
    rows: list[dict[str, Any]] = []
    try:
        for engine in (batching, single):
            await engine.start()
        shared, alone = Rows(), Rows()
        batching.add_observer(shared)
        single.add_observer(alone)
        ways: dict[str, Generate] = {
            "continuous": straight(batching),
            "one at a time": straight(single),
            "static": Static(batching).generate,
        }
        counted = {"continuous": shared, "one at a time": alone, "static": shared}
        steps = tuple(int(value) for value in given.steps.split(","))
        classes = batching.model.num_classes or 1
        start = time.perf_counter()
        await ways["one at a time"](GenerationRequest("first", (0,), steps=max(steps), class_labels=(0,)))
        load = Load(steps, classes, given.images, pause=0.1 * (time.perf_counter() - start))
        rate = 0.0
        for name in [*given.clients.split(","), "poisson"]:
            measured = {way: Measured() for way in ways}
            for round_ in range(given.rounds):
                for way, generate in ways.items():
                    counter = counted[way]
                    counter.rows = counter.steps = 0
                    if name == "poisson":
                        latencies, seconds = await load.open(generate, rate, round_)
                    else:
                        latencies, seconds = await load.closed(generate, int(name), round_)
                    result = measured[way]
                    result.latencies += latencies
                    result.seconds += seconds
                    result.rows += counter.rows
                    result.steps += counter.steps
            found = [
                result.row(f"{name} clients" if name != "poisson" else "poisson", way)
                for way, result in measured.items()
            ]
            base = next(row for row in found if row["way"] == "one at a time")
            for row in found:
                row["over one at a time"] = row["images_per_s"] / base["images_per_s"]
                say(f"{row['load']:>10} {row['way']:<14} {row['images_per_s']:.2f}/s, median {row['median_s']:.3f} s")
            rows += found
            if name == str(ROWS) or rate == 0.0:
                # Nine tenths of what the engine can do with 8 clients keep about that many inside.
                rate = 0.9 * found[0]["images_per_s"]
        return rows, {"backend": batching.state.backend, "poisson_rate": rate}
    finally:
        await batching.close()
        await single.close()


def main() -> None:
    arguments = parser("Throughput and latency of continuous batching.")
    arguments.add_argument("--bundle", type=Path, help="of the embedded model; built when left out")
    arguments.add_argument("--backend", default="auto")
    arguments.add_argument("--threads", type=int)
    arguments.add_argument("--clients", default="1,2,4,8,16", help="closed-loop concurrencies; 8 sets the Poisson rate")
    arguments.add_argument("--steps", default="20", help="denoising steps, one of these at random")
    arguments.add_argument("--images", type=int, default=64, help="for each way, load and round")
    arguments.add_argument("--rounds", type=int, default=3)
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        bundle = given.bundle or Path(scratch) / "fashion.qdm"
        if given.bundle is None:
            say("building the embedded model")
            build(BuildOptions(out=bundle, engines=()))
        rows, extra = asyncio.run(measure(given, bundle))
    shown = {"steps": given.steps, "images": given.images, "rounds": given.rounds}
    finish(f"serving-throughput-{extra['backend']['backend']}", COLUMNS, rows, {**extra, **shown}, save=given.save)


if __name__ == "__main__":
    main()
