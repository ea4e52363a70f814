"""Other quantizers get our rows, and no more of them at once than they were asked to hold."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lib.bench import Case
from lib.peer_models import BATCH, CalibrationMethod, Rows, quantized_static

from qdm_deploy.building.quality import output_sqnr_db, reference_run
from qdm_deploy.building.simulation import TorchSession
from qdm_deploy.runtime import Conditioning
from qdm_deploy.samplers import NoiseSchedule, step_table
from qdm_export.step_graph import StepGraph


def test_batches_hold_all_rows_once_and_can_be_cut_at_any_of_them(tiny: Any) -> None:
    calibration, table = tiny.calibration("labels"), tiny.table("labels")
    reader = Rows(calibration, table, ("sample", "timestep", "coefficients", "class_labels", "owner_row"))
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
def test_quantize_static_runs_and_stays_close_to_float(method: CalibrationMethod, tiny: Any, tmp_path: Path) -> None:
    checkpoint = tiny.checkpoint("labels")
    schedule = NoiseSchedule.from_config(checkpoint.scheduler_config)
    case = Case(
        "tiny", checkpoint, tiny.float_graph("labels"), tiny.topology("labels"), tiny.statistics("labels"), schedule,
        tiny.calibration("labels"),
    )  # fmt: skip
    session = TorchSession(StepGraph(checkpoint.unet, checkpoint.spec).eval(), "float")
    labels = Conditioning(class_labels=np.arange(3))
    reference = reference_run(session, step_table(schedule, "ddim", 3), range(3), checkpoint.spec, conditioning=labels)
    with quantized_static(case, method, tmp_path) as quantized:
        found = output_sqnr_db(reference, quantized, checkpoint.spec)
    assert len(found) == 3
    assert 5 < min(found) < max(found) < 60
    assert output_sqnr_db(reference, session, checkpoint.spec) == (200.0,) * 3
