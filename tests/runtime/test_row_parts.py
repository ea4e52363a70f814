"""Throughput mode: which batches are cut where, and that the parts together are the batch."""

from functools import partial
from typing import Any

import numpy as np
import pytest

from qdm_deploy.backends.onnxruntime.session import OnnxRuntimeSession
from qdm_deploy.backends.openvino.graph import largest_activation, read_graph
from qdm_deploy.backends.openvino.session import OpenVinoSession
from qdm_deploy.runtime.cpu import cpu_flags
from qdm_deploy.runtime.row_parts import part_of, row_parts
from tests.runtime.test_sessions import inputs_for


def links(*unconditional: int) -> dict[str, Any]:
    """Inputs of guided rows: each owns itself and looks at another row."""
    rows = np.arange(len(unconditional))
    return {"sample": rows * 10.0, "unconditional_row": np.array(unconditional), "owner_row": rows}


@pytest.mark.parametrize(
    ("inputs", "cores", "expected"),
    [
        (links(0, 1, 2, 3), 1, [4]),
        (links(0, 1, 2, 3), 2, [2, 2]),
        (links(0, 1, 2, 3), 9, [1, 1, 1, 1]),  # of two cores each
        (links(0, 1, 2, 3), 4, [1, 1, 1, 1]),
        (links(0, 1, 2), 2, [3]),  # two rows after each other on one core take longer than three on both
        (links(0, 1, 2), 4, [3]),  # a core would be idle
        (links(0, 1, 2), 3, [1, 1, 1]),
        (links(0, 1, 2, 3, 4, 5), 4, [3, 3]),  # of two cores each
        (links(0, 1, 2, 3, 4, 5), 3, [2, 2, 2]),
        (links(*range(10)), 2, [5, 5]),  # 2 + 2 + 2 rows on one core would end later
        (links(*range(16)), 2, [4, 4, 4, 4]),  # small parts, as many on every core
        (links(*range(16)), 1, [16]),
        (links(1, 1, 3, 3), 4, [2, 2]),  # pairs stay together
        (links(1, 1, 3, 3), 2, [2, 2]),
        (links(3, 1, 2, 3), 4, [4]),
        (links(0, 1, 2, 0), 2, [4]),
        ({"sample": np.zeros(4)}, 2, [2, 2]),  # unconditional
        (links(*range(4)), 16, [1] * 4),
        (links(*range(16)), 16, [1] * 16),  # one core each, before two rows on two each
        (links(*range(32)), 16, [2] * 16),
        (links(*range(12)), 16, [3] * 4),  # twelve parts of one row would leave four cores idle
        (links(0), 16, [1]),
    ],
)
def test_parts_are_equal_and_hold_their_links(inputs: dict[str, Any], cores: int, expected: list[int]) -> None:
    parts = row_parts(inputs, len(inputs["sample"]), cores)
    assert [part.stop - part.start for part in parts] == expected
    assert np.concatenate([inputs["sample"][part] for part in parts]).tolist() == inputs["sample"].tolist()
    for part in parts:
        own = part_of(inputs, part)
        for name in set(own) - {"sample"}:
            np.testing.assert_array_equal(own["sample"][own[name]], inputs["sample"][inputs[name][part]])


@pytest.mark.parametrize(
    ("rows", "small", "expected"),
    [(16, 4, [4] * 4), (16, 5, [4] * 4), (16, 8, [8, 8]), (64, 13, [8] * 8), (16, 100, [8, 8]), (4, 8, [2, 2])],
)
def test_parts_are_as_large_as_they_may_be(rows: int, small: int, expected: list[int]) -> None:
    parts = row_parts(links(*range(rows)), rows, 2, small)
    assert [part.stop - part.start for part in parts] == expected


def test_the_largest_tensor_counts_for_one_row(labelled: Any) -> None:
    pytest.importorskip("openvino")
    assert (
        largest_activation(read_graph(labelled.graph, cpu_flags())) == 9 * 4 * 4 * 4
    )  # the float32 history of a picture


@pytest.mark.parametrize(("cache", "rows"), [(8 << 20, [8, 8]), (1, [4, 4, 4, 4])])
def test_openvino_takes_the_largest_parts_that_stay_in_the_caches(
    labelled: Any, monkeypatch: pytest.MonkeyPatch, cache: int, rows: list[int]
) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setattr("qdm_deploy.backends.openvino.session._SMALL_BYTES", cache)
    seen: list[list[int]] = []

    def noted(*given: Any) -> list[slice]:
        parts = row_parts(*given)
        seen.append([part.stop - part.start for part in parts])
        return parts

    monkeypatch.setattr("qdm_deploy.backends.openvino.session.row_parts", noted)
    with OpenVinoSession(labelled.graph, threads=2, mode="throughput") as session:
        session.run(inputs_for(16, conditional=True))
    assert seen == [rows]


@pytest.mark.parametrize("session", [OnnxRuntimeSession, partial(OpenVinoSession, precision="f32")])
def test_guided_rows_come_out_as_in_one_batch(labelled: Any, session: Any) -> None:
    given = inputs_for(8, conditional=True)
    given["guidance"][:] = 3
    given["unconditional_row"] = np.array([1, 1, 3, 3, 5, 5, 7, 7])
    given["owner_row"] = np.array([0, 0, 2, 2, 4, 4, 6, 6])
    with (
        session(labelled.graph, threads=2) as whole,
        session(labelled.graph, threads=2, mode="throughput") as parted,
    ):
        assert parted.describe()["mode"] == "throughput"
        for _ in range(2):  # the second run writes over the first one's memory
            expected, found = whole.run(given), parted.run(given)
            np.testing.assert_allclose(found.next_sample, expected.next_sample, atol=1e-6)
            np.testing.assert_allclose(found.x0, expected.x0, atol=1e-6)
            given["sample"] = given["sample"][::-1].copy()


def test_onnxruntime_gives_a_row_the_same_bits_in_both_modes(labelled: Any) -> None:
    given = inputs_for(16, conditional=True)
    with (
        OnnxRuntimeSession(labelled.graph, threads=2) as whole,
        OnnxRuntimeSession(labelled.graph, threads=2, mode="throughput") as parted,
    ):
        expected, found = whole.run(given), parted.run(given)
    np.testing.assert_array_equal(found.next_sample, expected.next_sample)
    np.testing.assert_array_equal(found.x0, expected.x0)


def test_onnxruntime_shares_its_threads_among_the_parts(labelled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []
    own = OnnxRuntimeSession._opened

    def noted(self: OnnxRuntimeSession, threads: int) -> Any:
        opened.append(threads)
        return own(self, threads)

    monkeypatch.setattr(OnnxRuntimeSession, "_opened", noted)
    with (
        OnnxRuntimeSession(labelled.graph, threads=1) as one,
        OnnxRuntimeSession(labelled.graph, threads=4, mode="throughput") as session,
    ):
        opened.clear()
        for rows in (2, 4, 1, 4, 2):
            given = inputs_for(rows, conditional=True)
            np.testing.assert_array_equal(session.run(given).x0, one.run(given).x0)
        # Two parts of two threads, four of one, the whole; two sessions are kept, so the first opens again.
        assert opened == [2, 1, 4, 2]


def test_an_error_in_one_lane_arrives(labelled: Any) -> None:
    given = inputs_for(4, conditional=True)
    given["timestep"][3] = 10**6  # a row that the table of times does not have
    with (
        OnnxRuntimeSession(labelled.graph, threads=2, mode="throughput") as session,
        pytest.raises(Exception, match="indices element out of data bounds"),
    ):
        session.run(given)
