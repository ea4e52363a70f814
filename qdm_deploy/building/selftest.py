"""Self-test vectors: steps of the float model with what it answered, and how close INT8 came on the build machine.

An INT8 network answers a little differently on every CPU (one rounding that falls the other way changes the codes
behind it), so the expected values are the float model's, and a backend passes when it comes as close to them as it did
at build time, but for a tolerance. Wrong weights, a wrong graph or a broken kernel miss by tens of decibels.
"""

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdm_deploy.artifacts.bundle import Bundle
from qdm_deploy.artifacts.record import read_record, write_record
from qdm_deploy.errors import BundleError, InputError
from qdm_deploy.metrics.error import sqnr_per_step_db
from qdm_deploy.report.model import CheckRow
from qdm_deploy.runtime import StepSession

__all__ = ["TOLERANCE_DB", "answers", "distance_db", "run_selftest", "write_selftest"]

TOLERANCE_DB = 3.0
_INPUTS, _EXPECTED = "qdm-selftest-inputs", "qdm-selftest-expected"
_VERSION = 1


def answers(session: StepSession, inputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
    """One step of a session, as arrays of the caller's own."""
    output = session.run(inputs)
    return {"next_sample": output.next_sample.copy(), "x0": output.x0.copy()}


def distance_db(expected: Mapping[str, NDArray[np.float32]], got: Mapping[str, NDArray[np.float32]]) -> float:
    """Mean over the rows of the SQNR of the worse output."""
    return min(fmean(sqnr_per_step_db(expected[name], got[name])) for name in ("next_sample", "x0"))


def write_selftest(
    folder: Path,
    inputs: dict[str, NDArray[Any]],
    expected: dict[str, NDArray[np.float32]],
    reached: dict[str, float],
) -> None:
    """Write inputs, the float model's answers, and the SQNR in dB that each backend reached against them."""
    folder.mkdir()
    write_record(folder / "inputs.safetensors", kind=_INPUTS, version=_VERSION, document={}, arrays=inputs)
    write_record(
        folder / "expected.safetensors",
        kind=_EXPECTED,
        version=_VERSION,
        document={"reached_db": reached},
        arrays=expected,
    )


def run_selftest(bundle: Bundle, session: StepSession, backend: str) -> CheckRow:
    """Run the vectors of a bundle on an open session.

    Raises:
        BundleError: the bundle has no readable self-test.
    """
    document, inputs, expected = _vectors(bundle)
    reached = document.get("reached_db")
    got = answers(session, inputs)
    sqnr = distance_db(expected, got)
    name = f"self-test on {backend}"
    if not isinstance(reached, dict) or not isinstance(reached.get(backend), (int, float)):
        return CheckRow(
            name=name, ok=True, detail=f"{sqnr:.1f} dB from the float model; the build machine had no {backend}"
        )
    needed = float(reached[backend]) - TOLERANCE_DB
    detail = (
        f"{sqnr:.1f} dB from the float model; {float(reached[backend]):.1f} dB at build time, {needed:.1f} dB needed"
    )
    return CheckRow(name=name, ok=sqnr >= needed, detail=detail)


def _vectors(bundle: Bundle) -> tuple[dict[str, Any], dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
    """What ``write_selftest`` noted, the inputs and the float model's answers."""
    try:
        _, inputs = read_record(bundle.file("selftest/inputs.safetensors"), kind=_INPUTS, version=_VERSION)
        document, expected = read_record(bundle.file("selftest/expected.safetensors"), kind=_EXPECTED, version=_VERSION)
    except InputError as error:
        raise BundleError(f"the self-test of {bundle.path} cannot be read: {error}") from error
    return document, inputs, expected
