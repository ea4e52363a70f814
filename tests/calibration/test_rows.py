"""Which rows are taken where not all are needed."""

from typing import Any

import numpy as np

from qdm_calibration.rows import chosen_rows, in_batches, run_rows


def test_rows_are_spread_over_the_timesteps() -> None:
    timesteps = np.repeat(np.arange(20), 16)
    rows = chosen_rows(timesteps, 40, seed=0)
    assert np.bincount(timesteps[rows]).tolist() == [2] * 20
    assert len(np.unique(rows % 16)) > 8  # and over the trajectories
    assert len(chosen_rows(timesteps, 1000, seed=0)) == 320


def test_the_last_step_can_be_asked_for() -> None:
    timesteps = np.repeat(np.arange(100), 4)
    for seed in range(20):
        rows = chosen_rows(timesteps, 5, seed, last_step=True)
        assert timesteps[rows[0]] == 0
        assert len(set(timesteps[rows] // 20)) == 5
    assert any(timesteps[chosen_rows(timesteps, 5, seed)[0]] > 0 for seed in range(20))


def test_as_many_rows_as_timesteps_are_one_for_each_of_several_seeds(tiny: Any) -> None:
    data = tiny.calibration("labels")
    rows = chosen_rows(data.timestep, 12)
    assert data.timestep[rows].tolist() == np.unique(data.timestep).tolist()
    assert len(set(data.seed[rows])) > 1


def test_rows_run_in_batches_are_the_rows_run_at_once(tiny: Any) -> None:
    data, network = tiny.calibration("labels"), tiny.checkpoint("labels").unet
    rows = np.array([5, 0, 3])
    parts = list(in_batches(rows, 2))
    assert [part.tolist() for part in parts] == [[5, 0], [3]]
    found = np.concatenate([run_rows(network, data, part).detach().numpy() for part in parts])
    np.testing.assert_allclose(found, run_rows(network, data, rows).detach().numpy(), atol=1e-5)
