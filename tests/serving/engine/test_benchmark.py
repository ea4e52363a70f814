import asyncio
from argparse import Namespace
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_benchmark_runs_every_way_under_every_load(linear: Path) -> None:
    from serving_throughput import measure

    given = Namespace(backend="onnxruntime", threads=2, steps="3,6", images=12, rounds=2, clients="1,8")
    rows, extra = asyncio.run(measure(given, linear))
    ways = ["continuous", "one at a time", "static"]
    assert [(row["load"], row["way"]) for row in rows] == [
        (load, way) for load in ("1 clients", "8 clients", "poisson") for way in ways
    ]
    for row in rows:
        assert row["images_per_s"] > 0
        assert 0 < row["median_s"] <= row["p95_s"]
        assert row["over one at a time"] == 1 or row["way"] != "one at a time"
    assert extra["poisson_rate"] > 0
