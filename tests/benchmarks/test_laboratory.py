"""The papers' tables: what rows are made of, what is kept of them, and what is said about them."""

import dataclasses
import gzip
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lab.laboratory import EPS, FRECHET, LAST, OVER_FLOAT, Laboratory, Model, Settings, Skipped
from lab.operations import MU, OPERATIONS, PREVIOUS, SIGMA, ancestral_run, ancestral_step, grid, operation_numbers
from lab.runner import run, spreads
from lab.sources import SINGLE_STEPS, source_rows, timestep_rows
from lab.tables import TABLES
from lib.results import Finished
from numpy.typing import NDArray

from qdm_calibration.plan import PlanOptions
from qdm_deploy.building.bundle_from_checkpoint import EMBEDDED_MODEL
from qdm_deploy.building.simulation import TorchSession
from qdm_deploy.metrics.error import sqnr_db
from qdm_deploy.runtime import denoise
from qdm_deploy.samplers import apply_step
from qdm_deploy.samplers.columns import COEFFICIENTS
from qdm_deploy.samplers.conditioning import Conditioning
from qdm_deploy.samplers.sampling import Sampling
from qdm_export.step_graph import StepGraph
from qdm_export.unet import load_checkpoint


def idx(path: Path, values: NDArray[np.uint8]) -> None:
    head = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    path.write_bytes(gzip.compress(head + values.tobytes()))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of one grey each: label, then number; so a row shows which picture it is."""
    folder = tmp_path_factory.mktemp("images")
    labels = np.tile(np.arange(3, dtype=np.uint8), 8)
    greys = (labels * 80 + np.arange(24) // 3).astype(np.uint8)
    idx(folder / "train-images-idx3-ubyte.gz", np.broadcast_to(greys[:, None, None], (24, 10, 10)))
    idx(folder / "train-labels-idx1-ubyte.gz", labels)
    return folder


@pytest.fixture(scope="module")
def settings(images: Path) -> Settings:
    return Settings(seeds=3, steps=3, calibration_samples=3, images=str(images), reconstruct_iterations=2)


@pytest.fixture(scope="module")
def model(tiny: Any, settings: Settings) -> Model:
    return Model(tiny.checkpoint("labels"), settings)


@pytest.fixture
def lab(model: Model) -> Laboratory:
    return Laboratory(model, seed=1)


# ---------------------------------------------------------------------------------------------------------- calibration


def test_sources_differ_in_the_sample_alone(lab: Laboratory) -> None:
    trajectory = lab.trajectory()
    noise, images, forward = (source_rows(lab, name) for name in ("noise", "images", "forward"))
    for rows in (noise, images, forward):
        np.testing.assert_array_equal(rows.timestep, trajectory.timestep)
        np.testing.assert_array_equal(rows.conditioning["class_labels"], trajectory.conditioning["class_labels"])
    grey = (images.sample[:, 0, 0, 0] + 1) * 127.5
    assert np.ptp(images.sample, axis=(1, 2, 3)).max() == 0
    # Each row shows a picture of its own label, and a trajectory the same one at all timesteps.
    np.testing.assert_array_equal(np.round(grey) // 80, trajectory.conditioning["class_labels"])
    assert all(np.ptp(grey[trajectory.seed == seed]) == 0 for seed in np.unique(trajectory.seed))
    # The forward process is one of unit noise at high t and the image at low t.
    level = lab.model.schedule.alphas_cumprod[forward.timestep].reshape(-1, 1, 1, 1)
    drawn = (forward.sample - np.sqrt(level) * images.sample) / np.sqrt(1 - level)
    assert abs(drawn.mean()) < 0.02
    assert drawn.std() == pytest.approx(1, abs=0.02)
    assert noise.sample.std() == pytest.approx(1, abs=0.02)


def test_without_images_their_rows_are_left_out(model: Model, settings: Settings, tmp_path: Path) -> None:
    for folder, text in (("", "give --images a folder"), (str(tmp_path), "has no train-images-idx3-ubyte.gz")):
        lab = Laboratory(model, seed=0)
        lab.settings = dataclasses.replace(settings, images=folder)
        with pytest.raises(Skipped, match=text):
            source_rows(lab, "images")


def test_strategies_have_equally_many_rows_and_single_ones_one_timestep(lab: Laboratory) -> None:
    uniform = timestep_rows(lab, "uniform")
    assert len(np.unique(uniform.timestep)) == 11
    found = {name: timestep_rows(lab, name) for name in ("ndtc", *SINGLE_STEPS)}
    assert {len(rows) for rows in found.values()} == {len(uniform)}
    steps = {name: np.unique(found[name].step).tolist() for name in SINGLE_STEPS}
    assert steps == {"first": [0], "middle": [24], "last": [49]}
    assert len(np.unique(found["middle"].seed)) == len(uniform)  # a trajectory for each row


def test_calibration_seeds_share_no_trajectory(model: Model) -> None:
    first, second = (Laboratory(model, seed).trajectory() for seed in (0, 1))
    assert not set(first.seed.tolist()) & set(second.seed.tolist())


# ------------------------------------------------------------------------------------------------- operation selection


def test_the_step_without_grids_is_the_samplers(tiny: Any) -> None:
    table = tiny.table("labels")
    rng = np.random.default_rng(0)
    sample, output, noise = (rng.normal(size=(2, 1, 10, 10)).astype(np.float32) for _ in range(3))
    for coefficients in table.coefficients:
        rows = np.repeat(coefficients[None], 2, axis=0)
        expected, _, _ = apply_step(rows, sample, output, np.zeros((2, 3, 10, 10), np.float32), noise)
        found = ancestral_step(coefficients, sample, output, noise, {})
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


def test_a_run_without_grids_is_the_runtimes_and_fine_grids_come_close(tiny: Any) -> None:
    checkpoint, table, seeds = tiny.checkpoint("labels"), tiny.table("labels"), range(5)
    session = TorchSession(StepGraph(checkpoint.unet, checkpoint.denoiser).eval(), "float")
    expected = denoise(session, Sampling(table, seeds, Conditioning({"class_labels": np.arange(5) % 3})))
    states = ancestral_run(checkpoint.unet, checkpoint.spec, table, seeds, {})
    assert states.shape == (12, 5, 1, 10, 10)
    assert sqnr_db(expected, states[-1]) > 90
    fine = ancestral_run(
        checkpoint.unet, checkpoint.spec, table, seeds, {name: grid(2.0**-18, bits=24) for name in OPERATIONS}
    )
    assert sqnr_db(states[-1], fine[-1]) > 70


def test_each_grid_rounds_its_own_operation() -> None:
    # x0 = x, mu = x / 2, Sigma = 0.09
    given = {"p": 1, "clip": 3e38, "a": 0.25, "b": 0.25, "d": 0.3}
    coefficients = np.array([given.get(name, 0) for name in COEFFICIENTS], dtype=np.float32)
    sample = np.full((1, 1, 1, 2), 0.3, dtype=np.float32)
    noise = np.array([[[[1.0, -1.0]]]], dtype=np.float32)
    zeros = np.zeros_like(sample)

    def stepped(**grids: Callable[..., Any]) -> list[float]:
        named = {name: grids[key] for name, key in ((MU, "mu"), (SIGMA, "sigma"), (PREVIOUS, "x")) if key in grids}
        return [round(float(value), 4) for value in ancestral_step(coefficients, sample, zeros, noise, named).ravel()]

    assert stepped() == [0.45, -0.15]
    assert stepped(mu=grid(0.1)) == [0.5, -0.1]  # 0.15 is nearer to 0.2 in float32
    assert stepped(sigma=grid(0.04)) == pytest.approx([0.15 + 0.08**0.5, 0.15 - 0.08**0.5], abs=1e-4)
    assert stepped(x=grid(0.2)) == [0.4, -0.2]
    assert stepped(x=grid(0.001)) == [0.127, -0.128]  # both ends of the codes


def test_eight_bits_are_seen_in_the_images(lab: Laboratory) -> None:
    numbers = {name: operation_numbers([name], lab)["PSNR dB"] for name in (MU, PREVIOUS)}
    together = operation_numbers(OPERATIONS, lab)
    assert together["worst PSNR"] <= together["PSNR dB"]
    assert 15 < together["PSNR dB"] < min(numbers.values()) + 3
    assert max(numbers.values()) < 100
    assert operation_numbers([], lab)["PSNR dB"] == 200


# --------------------------------------------------------------------------------------------------------------- rows


@pytest.mark.slow
def test_a_split_row_is_measured(lab: Laboratory) -> None:
    numbers = TABLES["f"]["split, W4A8"](lab)
    assert set(numbers) == {EPS, LAST}
    assert 5 < numbers[EPS] < 60


@pytest.mark.slow
def test_pictures_of_a_broken_plan_are_further_from_real_ones(settings: Settings) -> None:
    model = Model(load_checkpoint(EMBEDDED_MODEL), dataclasses.replace(settings, frechet_images=64, frechet_steps=4))
    lab = Laboratory(model, seed=0)
    case = lab.case()
    plan = case.plan(PlanOptions(step_bins=1))
    good = lab.pictured(case, plan)
    coarse = [dataclasses.replace(layer, scale=16 * layer.scale) for layer in plan.layers]
    bad = lab.pictured(case, dataclasses.replace(plan, layers=tuple(coarse)))
    assert bad[OVER_FLOAT] > 10 * abs(good[OVER_FLOAT])
    assert good[FRECHET] - good[OVER_FLOAT] == pytest.approx(bad[FRECHET] - bad[OVER_FLOAT])
    lab.seed = 1
    assert lab.pictured(case, plan) == {}


# -------------------------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize(
    ("key", "common", "again"),
    [
        ({"row": "one"}, {"weights": "w"}, False),
        ({"row": "two"}, {"weights": "w"}, True),
        ({"row": "one"}, {"weights": "v"}, True),
    ],
)
def test_a_row_is_kept_by_all_that_decides_it(
    key: dict[str, str], common: dict[str, str], again: bool, tmp_path: Path
) -> None:
    Finished(tmp_path, weights="w").row({"row": "one"}, lambda: {EPS: 1.5})
    found = Finished(tmp_path, **common).row(key, lambda: {EPS: 2.5})
    assert found == {EPS: 2.5 if again else 1.5}


def test_without_a_folder_nothing_is_kept() -> None:
    kept = Finished(None)
    assert [kept.row({}, lambda: {EPS: value})[EPS] for value in (1.5, 2.5)] == [1.5, 2.5]  # noqa: B023


def test_spreads_are_over_the_calibration_seeds() -> None:
    rows = [
        {"table": "a", "row": name, "calibration_seed": seed, EPS: number, **more}
        for name, numbers, more in (("one", [40.0, 46.0, 41.0], {}), ("two", [30.0], {FRECHET: 2.0}))
        for seed, number in enumerate(numbers)
    ]
    assert spreads(rows) == [
        {"row": "one", EPS: "41.00 (40.00 to 46.00)"},
        {"row": "two", EPS: "30.00", FRECHET: "2.00"},
    ]


@pytest.mark.slow
def test_a_run_measures_what_is_asked_for_and_says_what_it_left_out(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def skipped(lab: Laboratory) -> dict[str, float]:
        raise Skipped("needs images")

    tables = {
        "x": {"seed": lambda lab: {EPS: float(lab.seed)}, "left": skipped, "another": lambda lab: {}},
        "slow": {"seed": lambda lab: {EPS: float(lab.seed)}},
        "y": {},
    }
    monkeypatch.setattr("lab.runner.load_checkpoint", lambda path: tiny.checkpoint("labels"))
    monkeypatch.setattr(
        "sys.argv", ["x", "--only", "x", "slow", "--rows", "seed;left", "--calibration-seeds", "3", "5"]
    )
    run("try", "", tables, slow=("slow",))
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(row["table"], row["row"], row[EPS]) for row in found["rows"]] == [
        ("x", "seed", 3.0), ("slow", "seed", 3.0), ("x", "seed", 5.0),
    ]  # fmt: skip
    assert found["skipped"] == {"x: left": "needs images"}
