"""Many requests, and memory that does not grow with them."""

import asyncio
from pathlib import Path

import pytest

from qdm_deploy.serving import ProcessEngine
from qdm_deploy.serving.contract import AdmissionRefused, GenerationFailed, GenerationRequest
from tests.runtime.conftest import NULL
from tests.serving.engine.fake import labels


def resident_mib(pid: int | str) -> float:
    """Resident memory of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise ValueError(pid)


def descriptors(pid: int | str) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


@pytest.mark.slow
def test_memory_is_flat_over_many_requests_and_an_overload(linear: Path) -> None:
    async def body() -> None:
        engine = ProcessEngine(linear, backend="onnxruntime", threads=1, max_rows=8, max_waiting=16)
        await engine.start()
        ended = {"finished": 0, "failed": 0, "refused": 0}

        async def one(name: str, index: int) -> None:
            request = GenerationRequest(
                name, (index, index), "ddpm", 4, conditioning=labels((0, 1), NULL), previews=2,
                guidance=1.0 + index % 2, deadline=0.002 if index % 11 == 0 else None,
            )  # fmt: skip
            try:
                generation = engine.submit(request)
            except AdmissionRefused:
                ended["refused"] += 1
                return
            if index % 7 == 0:
                asyncio.get_running_loop().call_later(0.001, generation.cancel)
            try:
                await generation.result()
                ended["finished"] += 1
            except GenerationFailed:
                ended["failed"] += 1

        async def burst(round_: int) -> None:
            await asyncio.gather(*(one(f"{round_}.{index}", index) for index in range(250)))

        try:
            assert engine.pid is not None
            for round_ in range(10):
                await burst(round_)
            before = [(resident_mib(pid), descriptors(pid)) for pid in (engine.pid, "self")]
            for round_ in range(10, 80):
                await burst(round_)
            after = [(resident_mib(pid), descriptors(pid)) for pid in (engine.pid, "self")]
        finally:
            await engine.close()
        assert sum(ended.values()) == 80 * 250
        assert min(ended.values()) > 100, ended
        for (memory, files), (memory_after, files_after) in zip(before, after, strict=True):
            assert memory_after < memory + 8
            assert files_after == files

    asyncio.run(body())
