"""Which steps run in float, and what a bundle that says so does everywhere."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qdm_deploy.artifacts.bundle import Bundle
from qdm_deploy.backends import MixedSession, open_session
from qdm_deploy.building.float_steps import best_count, counts_to_try, float_below_of, steps_below
from qdm_deploy.components.conditioning import conditioning_of
from qdm_deploy.components.pictures import read_metadata
from qdm_deploy.errors import BundleError, InputError
from qdm_deploy.pipeline import BuildOptions, BuildResult, CompareOptions, GenerateOptions, compare, generate, verify
from qdm_deploy.report import Report
from qdm_deploy.runtime import denoise
from qdm_deploy.samplers import NoiseSchedule, StepTable, step_table

# ------------------------------------------------------------------------------------------------------ pure functions


@pytest.mark.parametrize(
    ("steps", "counts"),
    [(1, (0,)), (2, (0, 1)), (19, (0, 1)), (20, (0, 1, 2)), (50, (0, 1, 2, 4)), (100, (0, 1, 2, 4, 8))],
)
def test_at_most_a_tenth_of_the_steps_is_tried(steps: int, counts: tuple[int, ...]) -> None:
    assert counts_to_try(steps) == counts


@pytest.mark.parametrize(
    ("scores", "count"),
    [
        ({0: 30.0}, 0),
        ({0: 30.0, 1: 30.4, 2: 40.0}, 0),  # the first does not pay for itself, whatever more would do
        ({0: 30.0, 1: 30.5, 2: 30.9}, 1),
        ({0: 30.0, 1: 33.0, 2: 32.0, 4: 39.0}, 1),
        ({0: 30.0, 1: 31.0, 2: 32.0, 4: 32.5}, 4),
        ({0: 30.0, 1: 29.0}, 0),
    ],
)
def test_the_smallest_number_is_taken_after_which_more_gains_little(scores: dict[int, float], count: int) -> None:
    assert best_count(scores) == count


def table_of(*timesteps: int) -> StepTable:
    return StepTable("ddim", np.array(timesteps), np.zeros((len(timesteps), 7), np.float32))


def test_the_boundary_lies_between_the_last_int8_step_and_the_first_float_step() -> None:
    table = table_of(30, 20, 11, 10)
    assert [float_below_of(table, count) for count in range(4)] == [None, 11, 16, 25]
    assert [steps_below(table, float_below_of(table, count)) for count in range(4)] == [0, 1, 2, 3]
    # In a run with other steps the same timesteps run in float.
    assert steps_below(table_of(40, 15, 5, 0), 16) == 3
    for count in (4, -1):
        with pytest.raises(InputError, match=rf"{count} steps were to run in float, and a run has 4; choose 0 to 3"):
            float_below_of(table, count)


# ------------------------------------------------------------------------------------------------------- a real bundle


@pytest.fixture(scope="module")
def mixed_build(quick_build: Any, tmp_path_factory: pytest.TempPathFactory) -> BuildResult:
    """The guided model with the last 2 of 8 steps in float; its verdict is from runs of 4 steps."""
    out: BuildResult = quick_build(
        tmp_path_factory.mktemp("mixed") / "mixed.qdm",
        targets=("onnxruntime",),
        guidance=1.5,
        float_steps=2,
        threads=1,
    )
    return out


def table_for(bundle: Bundle, steps: int = 8) -> StepTable:
    return step_table(NoiseSchedule.from_config(bundle.scheduler_config()), "ddim", steps)


def test_the_last_steps_are_those_of_the_float_graph(mixed_build: BuildResult) -> None:
    bundle = Bundle.open(mixed_build.bundle)
    table = table_for(bundle)
    assert bundle.manifest.float_below == (int(table.timesteps[-2]) + int(table.timesteps[-3]) + 1) // 2
    conditioning = conditioning_of(bundle.model, 3)
    states: dict[str, list[np.ndarray]] = {"mixed": [], "int8": []}  # type: ignore[type-arg]
    with open_session(bundle, "onnxruntime", threads=1) as session:
        assert isinstance(session, MixedSession)
        for name, used in (("mixed", session), ("int8", session.int8)):
            denoise(
                used, table, range(3), bundle.model, conditioning=conditioning, guidance=1.5,
                on_step=lambda _, sample, name=name: states[name].append(sample),  # type: ignore[misc]
            )  # fmt: skip
        # INT8 up to the boundary, and from the same state the two float steps.
        for step in range(6):
            np.testing.assert_array_equal(states["mixed"][step], states["int8"][step])
        last = StepTable("ddim", table.timesteps[6:].copy(), table.coefficients[6:].copy())
        finished = denoise(
            session.floating, last, range(3), bundle.model, conditioning=conditioning, guidance=1.5,
            initial=states["int8"][5],
        )  # fmt: skip
    np.testing.assert_array_equal(states["mixed"][7], finished)
    assert not np.array_equal(states["mixed"][7], states["int8"][7])


def test_the_report_tells_gain_and_cost_and_hides_no_error_of_int8(mixed_build: BuildResult) -> None:
    report = mixed_build.report
    (row,) = report.quality
    chosen = report.float_steps
    assert chosen is not None
    assert (chosen.automatic, chosen.steps, chosen.of_steps, chosen.measured_steps) == (False, 2, 8, 4)
    assert chosen.float_below == row.float_below == Bundle.open(mixed_build.bundle).manifest.float_below
    assert len(row.int8_psnr_db) == len(row.psnr_db) == 2
    assert chosen.gain_db == pytest.approx(np.mean(row.psnr_db) - np.mean(row.int8_psnr_db))
    assert row.psnr_db != row.int8_psnr_db
    # Float answers would be 100 dB and more away from nothing.
    assert max(row.eps_sqnr_db) < 60
    assert report.speedup is not None
    assert chosen.time_ratio == pytest.approx(1 + 2 / 8 * (report.speedup - 1))
    assert any("The last 2 of 8 steps (timesteps below" in merit for merit in report.verdict.merits)
    assert Report.from_json((mixed_build.bundle / "report.json").read_bytes()) == report


def test_generating_comparing_and_verifying_run_the_float_steps(mixed_build: BuildResult, tmp_path: Path) -> None:
    bundle = mixed_build.bundle
    below = Bundle.open(bundle).manifest.float_below
    made = generate(
        GenerateOptions(
            bundle=bundle, out=tmp_path / "out", count=1, steps=4, backend="onnxruntime", precision="int8", threads=1
        )
    )
    assert made.backend["float_below"] == below
    assert read_metadata(made.images[0]).backend == f"onnxruntime int8, float below timestep {below}"
    found = compare(
        CompareOptions(
            a=bundle, b=bundle, precision_a="float", samples=2, steps=4, guidance=1.5, seed=2**40, threads=1,
            backend_a="onnxruntime", backend_b="onnxruntime",
        )
    )  # fmt: skip
    (built,) = mixed_build.report.quality
    assert found.quality.float_below == below
    assert found.quality.psnr_db == pytest.approx(built.psnr_db, abs=0.5)
    assert found.quality.int8_psnr_db == pytest.approx(built.int8_psnr_db, abs=0.5)
    verified = verify(bundle, "onnxruntime")
    assert verified.ok
    assert [row.name for row in verified.selftest] == [
        "self-test on onnxruntime",
        "self-test of the float steps on onnxruntime",
    ]


def test_verification_judges_each_graph_by_itself(mixed_build: BuildResult) -> None:
    from qdm_deploy.building.selftest import run_float_selftest

    bundle = Bundle.open(mixed_build.bundle)
    with open_session(bundle, "onnxruntime", threads=1) as session:
        assert isinstance(session, MixedSession)
        assert run_float_selftest(bundle, session.floating, "onnxruntime").ok
        row = run_float_selftest(bundle, session.int8, "onnxruntime")
    assert not row.ok
    assert "60.0 dB needed" in row.detail


def test_automatic_steps_are_measured_and_written_down(quick_build: Any, tmp_path: Path) -> None:
    result: BuildResult = quick_build(
        tmp_path / "auto.qdm", "rgb", targets=("onnxruntime",), float_steps="auto", threads=1
    )
    chosen = result.report.float_steps
    assert chosen is not None
    assert (chosen.automatic, chosen.tried, chosen.measured_steps, chosen.metric) == (True, (0, 1), 4, "psnr")
    table = table_for(Bundle.open(result.bundle), 4)
    expected = float_below_of(table, best_count(dict(zip(chosen.tried, chosen.score_db, strict=True))))
    assert Bundle.open(result.bundle).manifest.float_below == chosen.float_below == expected
    row = result.report.quality[0]
    alone = row.psnr_db if expected is None else row.int8_psnr_db
    assert chosen.score_db[0] == pytest.approx(np.mean(alone), abs=0.2)
    assert result.report.recipe["float_steps"] == "auto"


def test_without_float_steps_nothing_changes(labels_build: BuildResult) -> None:
    document = json.loads((labels_build.bundle / "manifest.json").read_bytes())
    assert "float_below" not in document
    assert document["schema_version"] == "1.0"
    assert labels_build.report.float_steps is None
    with open_session(Bundle.open(labels_build.bundle), "onnxruntime") as session:
        assert not isinstance(session, MixedSession)


def test_a_bundle_whose_float_graph_was_taken_away_does_not_open(mixed_build: BuildResult, tmp_path: Path) -> None:
    import hashlib
    import shutil

    from qdm_deploy.artifacts.files import canonical_json

    copy = tmp_path / "copy.qdm"
    shutil.copytree(mixed_build.bundle, copy)
    document = json.loads((copy / "manifest.json").read_bytes())
    del document["bundle_id"]
    (copy / "unet" / "float.onnx").unlink()
    document["files"] = [entry for entry in document["files"] if entry["path"] != "unet/float.onnx"]
    document["bundle_id"] = hashlib.sha256(canonical_json(document)).hexdigest()
    (copy / "manifest.json").write_text(json.dumps(document, sort_keys=True, indent=2, ensure_ascii=False) + "\n")
    with pytest.raises(BundleError, match=rf"steps below timestep {document['float_below']} need unet/float\.onnx"):
        Bundle.open(copy)


# ------------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"float_steps": -1}, r"float steps is -1; it must be from 0 to 49"),
        ({"float_steps": 50}, r"float steps is 50; it must be from 0 to 49"),
        ({"float_steps": "some"}, r"float steps is 'some'; give a number of steps, or auto"),
        ({"float_steps": 1, "float_graph": False}, r"float steps is 1, and the float graph .* left out"),
        ({"float_steps": "auto", "float_graph": False}, r"float steps is auto, and the float graph .* left out"),
    ],
)
def test_options_that_cannot_be_built_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        BuildOptions(out=Path("x"), **changes)
