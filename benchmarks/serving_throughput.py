"""Continuous batching beside one image at a time and beside static batches of 8: throughput and latency.

The embedded model on one backend, one image a request. Closed loop: so many clients, each waits for its image, then for
an exponential pause, then asks again; they start staggered as well. Open loop: Poisson arrivals at a rate that keeps
about 8 requests inside, whatever the answers. The three ways meet the same arrivals, in turn, in the same run:

- continuous: the engine as ``serve`` starts it, 8 rows;
- one at a time: the engine with one row, all threads on it;
- static: batches of up to 8 of those who wait, the next one when the last image of this one is done; it runs on the
  engine of the first way, so that only the batching differs.

    python benchmarks/serving_throughput.py --bundle demo/fashion.qdm --save zen5
    python benchmarks/serving_throughput.py --bundle demo/fashion.qdm --clients 2 --steps 2 --images 4 --rounds 1
"""

import argparse
import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lib.results import finish, parser, say

from qdm_deploy.components.encoders import Encoder, open_encoder
from qdm_deploy.pipeline import BuildOptions, build
from qdm_deploy.serving import ProcessEngine
from qdm_deploy.serving.contract import GenerationRequest

ROWS = 8
Generate = Callable[[GenerationRequest], Awaitable[object]]


class Static:
    """Takes up to ``ROWS`` of those who wait, runs them to the end, and only then takes the next."""

    def __init__(self, generate: Generate) -> None:
        """Run each by ``generate``."""
        self._generate = generate
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
            await asyncio.gather(*(self._generate(request) for request, _ in batch))
            for _, done in batch:
                done.set_result(None)


@dataclass(frozen=True)
class Load:
    """Requests of one kind of arrival; the same ones for every way."""

    steps: tuple[int, ...]
    encoder: Encoder
    images: int
    pause: float

    async def closed(self, generate: Generate, clients: int, seed: int) -> list[float]:
        """Latencies of so many clients that ask again when they have their image."""
        latencies: list[float] = []
        asked = 0

        async def client(number: int) -> None:
            nonlocal asked
            chance = np.random.default_rng([seed, number])
            await asyncio.sleep(chance.exponential(self.pause * clients))
            while asked < self.images:
                asked += 1
                latencies.append(await self._one(generate, asked, chance))
                await asyncio.sleep(chance.exponential(self.pause))

        await asyncio.gather(*(client(number) for number in range(clients)))
        return latencies

    async def open(self, generate: Generate, rate: float, seed: int) -> list[float]:
        """Latencies of Poisson arrivals at ``rate`` a second."""
        chance = np.random.default_rng(seed)
        tasks = []
        async with asyncio.TaskGroup() as group:
            for index in range(self.images):
                await asyncio.sleep(chance.exponential(1 / rate))
                tasks.append(group.create_task(self._one(generate, index, chance)))
        return [task.result() for task in tasks]

    async def _one(self, generate: Generate, index: int, chance: np.random.Generator) -> float:
        steps, start = int(chance.choice(self.steps)), time.perf_counter()
        await generate(
            GenerationRequest(f"r{index}", (index,), steps=steps, conditioning=self.encoder.encode([None], first=index))
        )
        return time.perf_counter() - start


async def measure(given: argparse.Namespace, bundle: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    common: dict[str, Any] = {"backend": given.backend, "threads": given.threads, "max_waiting": 10_000}
    batching = ProcessEngine(bundle, max_rows=ROWS, **common)
    encoder = open_encoder(batching.model)
    single = ProcessEngine(bundle, max_rows=1, **common)

    def straight(engine: ProcessEngine) -> Generate:
        return lambda request: engine.submit(request).result()

    ways = {
        "continuous": straight(batching),
        "one at a time": straight(single),
        "static": Static(straight(batching)).generate,
    }
    rows: list[dict[str, Any]] = []
    rate = 0.0
    try:
        for engine in (batching, single):
            await engine.start()
        steps = tuple(int(value) for value in given.steps.split(","))
        start = time.perf_counter()
        await straight(single)(GenerationRequest("first", (0,), steps=max(steps), conditioning=encoder.encode([None])))
        pause = 0.1 * (time.perf_counter() - start)
        load = Load(steps, encoder, given.images, pause)
        for name in [*given.clients.split(","), "poisson"]:
            latencies: dict[str, list[float]] = {way: [] for way in ways}
            seconds = dict.fromkeys(ways, 0.0)
            for round_ in range(given.rounds):
                for way, generate in ways.items():
                    start = time.perf_counter()
                    if name == "poisson":
                        latencies[way] += await load.open(generate, rate, round_)
                    else:
                        latencies[way] += await load.closed(generate, int(name), round_)
                    seconds[way] += time.perf_counter() - start
            per_s = {way: len(found) / seconds[way] for way, found in latencies.items()}
            for way, found in latencies.items():
                rows.append(
                    {
                        "load": name if name == "poisson" else f"{name} clients",
                        "way": way,
                        "images_per_s": per_s[way],
                        "median_s": float(np.median(found)),
                        "p95_s": float(np.percentile(found, 95)),
                        "over one at a time": per_s[way] / per_s["one at a time"],
                    }
                )
                say(f"{rows[-1]['load']:>10} {way:<14} {per_s[way]:.2f}/s, median {rows[-1]['median_s']:.3f} s")
            if name == str(ROWS) or rate == 0.0:
                # Nine tenths of what the engine can do with 8 clients keep about that many inside.
                rate = 0.9 * rows[-3]["images_per_s"]
        return rows, {"backend": batching.state.backend, "poisson_rate": rate}
    finally:
        await batching.close()
        await single.close()


def main() -> None:
    arguments = parser(__doc__)
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
    finish(f"serving-throughput-{extra['backend']['backend']}", rows, {**extra, **shown}, save=given.save)


if __name__ == "__main__":
    main()
