"""A tiny model as the benchmarks hold theirs."""

from typing import Any

import pytest
from lib.case import Case

from qdm_deploy.samplers import NoiseSchedule


@pytest.fixture(scope="session")
def labels(tiny: Any) -> Case:
    """The tiny class-conditional U-Net, calibrated."""
    checkpoint = tiny.checkpoint("labels")
    return Case(
        "tiny", checkpoint, tiny.float_graph("labels"), tiny.topology("labels"), tiny.statistics("labels"),
        NoiseSchedule.from_config(checkpoint.scheduler_config), tiny.calibration("labels"),
    )  # fmt: skip
