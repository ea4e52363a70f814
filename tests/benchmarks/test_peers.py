"""Other quantizers get our rows, and no more of them at once than they were asked to hold."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lib.case import Case, write_float
from lib.contest import reference_of
from lib.peers import BATCH, CalibrationMethod, Rows, quantized_static

from qdm_deploy.backends import OnnxRuntimeSession
from qdm_deploy.building.quality import output_sqnr_db


def test_batches_hold_all_rows_once_and_can_be_cut_at_any_of_them(tiny: Any) -> None:
    calibration, table = tiny.calibration("labels"), tiny.table("labels")
    names = ("sample", "timestep", "coefficients", "class_labels", "owner_row")
    reader = Rows(calibration, tiny.checkpoint("labels").denoiser, table, names)
    batches = list(reader)
    assert len(batches) == len(reader) == -(-len(calibration) // BATCH)
    assert len(batches[0]["sample"]) == BATCH
    for name, values in (("sample", calibration.sample), ("timestep", calibration.timestep)):
        np.testing.assert_array_equal(np.concatenate([batch[name] for batch in batches]), values)
    np.testing.assert_array_equal(batches[-1]["owner_row"], np.arange(len(batches[-1]["sample"])))
    assert reader.get_next() is None
    reader.set_range(1, 2)
    (second,) = list(reader)
    np.testing.assert_array_equal(second["sample"], batches[1]["sample"])


@pytest.mark.slow
@pytest.mark.parametrize("method", [CalibrationMethod.MinMax, CalibrationMethod.Percentile])
def test_quantize_static_runs_and_stays_close_to_float(method: CalibrationMethod, labels: Case, tmp_path: Path) -> None:
    graph = quantized_static(labels, write_float(labels, tmp_path), method)
    with OnnxRuntimeSession(graph) as quantized:
        found = output_sqnr_db(reference_of(labels), quantized)
    assert len(found) == 5
    assert 5 < min(found) < max(found) < 60
