"""The papers' tables: what rows are made of, what is kept of them, and what is written about them."""

import dataclasses
import gzip
import struct
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from lab.document import Spread, document, merged, spreads, verdict
from lab.laboratory import EPS, FRECHET, LAST, OVER_FLOAT, Laboratory, Model, Settings
from lab.operations import (
    MU,
    OPERATIONS,
    PREVIOUS,
    SIGMA,
    Grid,
    ancestral_run,
    ancestral_step,
    operation_numbers,
)
from lab.papers import FINDINGS, Finding
from lab.row import Row, RowCache, Skipped, code_version
from lab.sources import SINGLE_STEPS, source_rows, timestep_rows
from lab.tables import LETTERS, rows_of
from numpy.typing import NDArray

from qdm_deploy.building.bundle_from_checkpoint import EMBEDDED_MODEL
from qdm_deploy.building.simulation import TorchSession
from qdm_deploy.metrics.error import sqnr_db
from qdm_deploy.runtime import Conditioning, denoise
from qdm_deploy.samplers import apply_step
from qdm_export.step_graph import StepGraph
from qdm_export.unet import load_checkpoint
from tests.recipes import recipe_of


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
def settings(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return Settings(
        seeds=3, steps=3, samples=3, images=images, cache=None, iterations=2, scratch=tmp_path_factory.mktemp("scratch")
    )


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
    for folder, text in ((None, "give --images a folder"), (tmp_path, "has no train-images-idx3-ubyte.gz")):
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


def test_calibration_seeds_share_no_trajectory_and_sets_are_kept(
    model: Model, settings: Settings, tmp_path: Path
) -> None:
    labs = [Laboratory(model, seed) for seed in (0, 1)]
    for lab in labs:
        lab.settings = dataclasses.replace(settings, cache=tmp_path)
    first, second = (lab.trajectory() for lab in labs)
    assert not set(first.seed.tolist()) & set(second.seed.tolist())
    again = Laboratory(model, 0)
    again.settings = labs[0].settings
    assert len(list(tmp_path.glob("set-*.safetensors"))) == 2
    np.testing.assert_array_equal(again.trajectory().sample, first.sample)
    assert len(list(tmp_path.glob("set-*.safetensors"))) == 2


# ------------------------------------------------------------------------------------------------- operation selection


def test_the_step_without_grids_is_the_samplers(tiny: Any) -> None:
    table = tiny.table("labels")
    rng = np.random.default_rng(0)
    sample, output, noise = (rng.normal(size=(2, 1, 10, 10)).astype(np.float32) for _ in range(3))
    for coefficients in table.coefficients:
        rows = np.repeat(coefficients[None], 2, axis=0)
        expected, _ = apply_step(rows, sample, output, np.zeros_like(sample), noise)
        found = ancestral_step(coefficients, sample, output, noise, {})
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


def test_a_run_without_grids_is_the_runtimes_and_fine_grids_come_close(tiny: Any) -> None:
    checkpoint, table, seeds = tiny.checkpoint("labels"), tiny.table("labels"), range(5)
    session = TorchSession(StepGraph(checkpoint.unet, checkpoint.spec).eval(), "float")
    labels = Conditioning(class_labels=np.arange(5) % 3)
    expected = denoise(session, table, seeds, checkpoint.spec, conditioning=labels)
    states = ancestral_run(checkpoint.unet, checkpoint.spec, table, seeds, {})
    assert states.shape == (12, 5, 1, 10, 10)
    assert sqnr_db(expected, states[-1]) > 90
    fine = ancestral_run(
        checkpoint.unet, checkpoint.spec, table, seeds, {name: Grid(2.0**-18, bits=24) for name in OPERATIONS}
    )
    assert sqnr_db(states[-1], fine[-1]) > 70


def test_each_grid_rounds_its_own_operation() -> None:
    # p, q, clip, a, b, c, d: x0 = x, mu = x / 2, Sigma = 0.09
    coefficients = np.array([1, 0, 3e38, 0.25, 0.25, 0, 0.3], dtype=np.float32)
    sample = np.full((1, 1, 1, 2), 0.3, dtype=np.float32)
    noise = np.array([[[[1.0, -1.0]]]], dtype=np.float32)
    zeros = np.zeros_like(sample)

    def stepped(**grids: Callable[..., Any]) -> list[float]:
        named = {name: grids[key] for name, key in ((MU, "mu"), (SIGMA, "sigma"), (PREVIOUS, "x")) if key in grids}
        return [round(float(value), 4) for value in ancestral_step(coefficients, sample, zeros, noise, named).ravel()]

    assert stepped() == [0.45, -0.15]
    assert stepped(mu=Grid(0.1)) == [0.5, -0.1]  # 0.15 is nearer to 0.2 in float32
    assert stepped(sigma=Grid(0.04)) == pytest.approx([0.15 + 0.08**0.5, 0.15 - 0.08**0.5], abs=1e-4)
    assert stepped(x=Grid(0.2)) == [0.4, -0.2]
    assert stepped(x=Grid(0.001)) == [0.127, -0.128]  # both ends of the codes


def test_eight_bits_are_seen_in_the_images(lab: Laboratory) -> None:
    numbers = {name: operation_numbers(lab, [name])["PSNR dB"] for name in (MU, PREVIOUS)}
    together = operation_numbers(lab, OPERATIONS)
    assert together["worst PSNR"] <= together["PSNR dB"]
    assert 15 < together["PSNR dB"] < min(numbers.values()) + 3
    assert max(numbers.values()) < 100
    assert operation_numbers(lab, [])["PSNR dB"] == 200


# --------------------------------------------------------------------------------------------------------------- rows


def test_every_letter_has_rows_of_different_names_and_keys(settings: Settings) -> None:
    assert list(LETTERS) == list(FINDINGS)
    cache = RowCache(None, {})
    for letter in LETTERS:
        rows = rows_of(letter, settings)
        assert len({row.name for row in rows}) == len({cache.key(row, 0) for row in rows}) == len(rows) > 1
        named = {name for chain in FINDINGS[letter].chains for name in chain}
        assert named <= {row.name for row in rows}
        assert min(row.cost for row in rows) > 0


def test_a_plan_row_is_measured_as_the_laboratory_does(lab: Laboratory, settings: Settings) -> None:
    row = next(row for row in rows_of("f", settings) if row.name == "split, W4A8")
    numbers = row.measure(lab)
    assert set(numbers) == {EPS, LAST}
    assert 5 < numbers[EPS] < 60
    # The statistics were made once: for the whole network, and for the split one.
    assert list(lab._cases) == ["", " split"]


def test_plans_that_round_alike_are_measured_once(lab: Laboratory, monkeypatch: pytest.MonkeyPatch) -> None:
    case, sessions = lab.case(), []
    measured = lab.measured
    monkeypatch.setattr(lab, "measured", lambda session: sessions.append(session) or measured(session))
    numbers = lab.planned(case, recipe_of(step_bins=1))
    plan = case.plan(recipe_of(step_bins=1))

    def changed(**values: Any) -> dict[str, float]:
        last = plan.quantized[-1]
        layers = [dataclasses.replace(layer, **values) if layer is last else layer for layer in plan.layers]
        return lab.simulated(case.checkpoint, dataclasses.replace(plan, layers=tuple(layers)))

    assert changed(notes={"s": "another reason"}) == numbers
    assert len(sessions) == 1
    assert changed(scale=2 * plan.quantized[-1].scale) != numbers
    assert len(sessions) == 2


@pytest.mark.slow
def test_pictures_of_a_broken_plan_are_further_from_real_ones(settings: Settings) -> None:
    model = Model(load_checkpoint(EMBEDDED_MODEL), dataclasses.replace(settings, frechet_images=64, frechet_steps=4))
    lab = Laboratory(model, seed=0)
    case = lab.case()
    plan = case.plan(recipe_of(step_bins=1))
    good = lab.pictured(case, plan)
    coarse = [dataclasses.replace(layer, scale=16 * layer.scale) for layer in plan.layers]
    bad = lab.pictured(case, dataclasses.replace(plan, layers=tuple(coarse)))
    assert bad[OVER_FLOAT] > 10 * abs(good[OVER_FLOAT])
    assert good[FRECHET] - good[OVER_FLOAT] == pytest.approx(bad[FRECHET] - bad[OVER_FLOAT])
    lab.seed = 1
    assert lab.pictured(case, plan) == {}


# -------------------------------------------------------------------------------------------------------------- cache


ROW = Row("a", "one", {"plan": {"ranges": "mse"}}, lambda lab: {}, 10)


@pytest.mark.parametrize(
    "other",
    [
        (ROW, 1, {"weights": "w", "code": "c"}),
        (ROW, 0, {"weights": "v", "code": "c"}),
        (ROW, 0, {"weights": "w", "code": "d"}),
        (dataclasses.replace(ROW, name="two"), 0, {"weights": "w", "code": "c"}),
        (dataclasses.replace(ROW, letter="b"), 0, {"weights": "w", "code": "c"}),
        (dataclasses.replace(ROW, options={"plan": {"ranges": "lp"}}), 0, {"weights": "w", "code": "c"}),
    ],
)
def test_the_key_sees_all_that_decides_a_number(other: tuple[Row, int, dict[str, str]], tmp_path: Path) -> None:
    common = {"weights": "w", "code": "c"}
    cache = RowCache(tmp_path, common)
    cache.write(ROW, 0, {EPS: 1.5})
    row, seed, others = other
    assert RowCache(tmp_path, others).read(row, seed) is None
    # The same options in another order, an estimate of the cost, and who measures it are no part of it.
    same = dataclasses.replace(
        ROW, options=MappingProxyType(dict(ROW.options)), cost=99, measure=lambda lab: {EPS: 0.0}
    )
    assert RowCache(tmp_path, dict(reversed(common.items()))).read(same, 0) == {EPS: 1.5}


def test_without_a_folder_nothing_is_kept() -> None:
    cache = RowCache(None, {})
    cache.write(ROW, 0, {EPS: 1.5})
    assert cache.read(ROW, 0) is None


def test_the_code_version_sees_code_and_not_words(tmp_path: Path) -> None:
    def version(text: str) -> str:
        (tmp_path / "module.py").write_text(text)
        return code_version([tmp_path / "module.py"])

    base = version('"""Words."""\n\ndef f(x):\n    """Words."""\n    return x + 1\n')
    assert version('"""Others."""\n# a comment\ndef f(x):\n    """Others."""\n\n    return x + 1  # why\n') == base
    assert version("def f(x):\n    return x + 1\n") == base
    assert version('"""Words."""\n\ndef f(x):\n    """Words."""\n    return x + 2\n') != base
    (tmp_path / "other.py").write_text("")
    assert code_version([tmp_path / "module.py", tmp_path / "other.py"]) != base


# ----------------------------------------------------------------------------------------------------------- document


def rows(letter: str, **values: list[float]) -> list[dict[str, Any]]:
    return [
        {"letter": letter, "row": name.replace("_", " "), "calibration_seed": seed, EPS: number, LAST: number - 20}
        for name, numbers in values.items()
        for seed, number in enumerate(numbers)
    ]


FINDING = Finding("T", "S", "good, fair, poor", chains=(("good", "fair", "poor"),))


def test_spreads_are_over_the_calibration_seeds() -> None:
    found = spreads([*rows("a", one=[40.0, 46.0, 41.0], two=[30.0]), *rows("b", three=[1.0])], "a")
    assert list(found) == ["one", "two"]
    assert found["one"][EPS] == Spread(41.0, 40.0, 46.0, 3)
    assert str(found["one"][EPS]) == "41.00 (40.00 to 46.00)"
    assert str(found["two"][LAST]) == "10.00"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"good": [3.0], "fair": [2.0], "poor": [1.0]}, "**Ordering holds here: yes.**"),
        (
            {"good": [3.0], "fair": [1.0], "poor": [2.0]},
            "**Ordering holds here: no.** fair is not above poor (1.00 and 2.00).",
        ),
        (
            {"good": [3.0, 4.0, 5.0], "fair": [2.0, 3.0, 3.5], "poor": [1.0]},
            "**Ordering holds here: yes.** The spreads overlap: good and fair.",
        ),
        ({"good": [3.0], "poor": [2.0]}, "**Ordering holds here: yes.** Not measured: fair."),
        ({"good": [3.0]}, "**Ordering holds here: not measured.**"),
    ],
)
def test_verdicts(values: dict[str, list[float]], said: str) -> None:
    assert verdict(FINDING, spreads(rows("a", **values), "a")) == said


def test_a_verdict_may_ask_for_a_level() -> None:
    finding = Finding("T", "S", "all can", metric=EPS, at_least=30)
    assert verdict(finding, spreads(rows("d", mu=[31.0], Sigma=[30.0]), "d")).endswith("in every row): yes.**")
    assert verdict(finding, spreads(rows("d", mu=[31.0], Sigma=[29.0]), "d")).endswith("no.** Below it: Sigma.")


def test_letters_of_a_later_result_replace_those_of_the_first() -> None:
    first = {"weights": "w", "rows": [*rows("c", KL=[1.0]), *rows("f", split=[2.0])]}
    both = merged([first, {"weights": "x", "rows": rows("c", KL=[3.0, 4.0])}])
    assert (both["weights"], both["other_weights"]) == ("w", {"c": "x"})
    again = merged(
        [first, {"weights": "x", "rows": rows("c", KL=[3.0])}, {"weights": "w", "rows": rows("c", KL=[5.0])}]
    )
    assert again["other_weights"] == {}
    assert spreads(both["rows"], "c")["KL"][EPS].median == 3.5
    assert spreads(both["rows"], "f")["split"][EPS].median == 2.0


def test_the_document_has_every_letter_its_source_and_its_verdict() -> None:
    result = {
        "weights": "0123456789abcdef", "seeds": 64, "steps": 20, "calibration_samples": 16, "calibration_steps": 50,
        "calibration_seeds": [0, 1, 2], "reconstruct_seeds": [0], "skipped": {"(a) real": "needs images"},
        "frechet_images": 1000, "frechet_steps": 10,
        "rows": [
            *rows("c", KL=[41.0, 42.0, 43.0], L1=[44.0, 45.0, 46.0], cosine=[46.5, 47.0, 47.5]),
            *rows("f", first=[44.0, 45.0]), {**rows("f", second=[41.0])[0], FRECHET: 12.5},
        ],
    }  # fmt: skip
    result["other_weights"] = {"c": "fedcba9876543210"}
    text = document(result, {"c": "Because of the tails."}, ["2026-01-01-paper-tables.json"])
    assert "(weights `0123456789ab`; in (c) `fedcba987654`)" in text
    for letter, finding in FINDINGS.items():
        assert f"\n## ({letter}) {finding.title}\n" in text
        assert finding.source in text
    assert "\n| here | eps SQNR dB | last step |\n| --- | ---: | ---: |\n| KL | 42.00 (41.00 to 43.00) |" in text
    assert "\n| MSE (p = 2.4) | 13.76 | 30.46 | 19.42 |\n" in text
    assert "KL is not above L1 (42.00 and 45.00)." in text
    assert "\nBecause of the tails.\n" in text
    assert "\n- (a) real: needs images\n" in text
    # Not all rows have all columns.
    assert "\n| here | eps SQNR dB | last step | Frechet distance |\n" in text
    assert (
        "\n| first | 44.50 (44.00 to 45.00) | 24.50 (24.00 to 25.00) |  |\n| second | 41.00 | 21.00 | 12.50 |" in text
    )
    assert text.count("not measured.**") == len(FINDINGS) - 1
    assert "2026-01-01-paper-tables.json" in text
