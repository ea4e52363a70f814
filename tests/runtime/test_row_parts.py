"""Throughput mode: which batches are cut where, and that the parts together are the batch."""

from typing import Any

import numpy as np
import pytest

from qdm_deploy.runtime.openvino_session import OpenVinoSession
from qdm_deploy.runtime.row_parts import part_of, row_parts
from tests.runtime.test_sessions import inputs_for


def links(*unconditional: int) -> dict[str, Any]:
    """Inputs of guided rows: each owns itself and looks at another row."""
    rows = np.arange(len(unconditional))
    return {"sample": rows * 10.0, "unconditional_row": np.array(unconditional), "owner_row": rows}


@pytest.mark.parametrize(
    ("inputs", "most", "expected"),
    [
        (links(0, 1, 2, 3), 1, [4]),
        (links(0, 1, 2, 3), 2, [2, 2]),
        (links(0, 1, 2, 3), 9, [1, 1, 1, 1]),
        (links(0, 1, 2), 2, [3]),  # no equal halves
        (links(0, 1, 2), 4, [1, 1, 1]),
        (links(0, 1, 2, 3, 4, 5), 4, [2, 2, 2]),
        (links(1, 1, 3, 3), 4, [2, 2]),  # pairs stay together
        (links(3, 1, 2, 3), 4, [4]),
        (links(0, 1, 2, 0), 2, [4]),
        ({"sample": np.zeros(4)}, 2, [2, 2]),  # unconditional
    ],
)
def test_parts_are_equal_and_hold_their_links(inputs: dict[str, Any], most: int, expected: list[int]) -> None:
    parts = row_parts(inputs, len(inputs["sample"]), most)
    assert [part.stop - part.start for part in parts] == expected
    assert np.concatenate([inputs["sample"][part] for part in parts]).tolist() == inputs["sample"].tolist()
    for part in parts:
        own = part_of(inputs, part)
        for name in set(own) - {"sample"}:
            np.testing.assert_array_equal(own["sample"][own[name]], inputs["sample"][inputs[name][part]])


def test_guided_rows_come_out_as_in_one_batch(labelled: Any) -> None:
    given = inputs_for(8, conditional=True)
    given["guidance"][:] = 3
    given["unconditional_row"] = np.array([1, 1, 3, 3, 5, 5, 7, 7])
    given["owner_row"] = np.array([0, 0, 2, 2, 4, 4, 6, 6])
    with (
        OpenVinoSession(labelled.graph, threads=2, precision="f32") as whole,
        OpenVinoSession(labelled.graph, threads=2, precision="f32", mode="throughput") as parted,
    ):
        assert parted.describe()["mode"] == "throughput"
        for _ in range(2):  # the second run writes over the first one's memory
            expected, found = whole.run(given), parted.run(given)
            np.testing.assert_allclose(found.next_sample, expected.next_sample, atol=1e-6)
            np.testing.assert_allclose(found.x0, expected.x0, atol=1e-6)
            given["sample"] = given["sample"][::-1].copy()
