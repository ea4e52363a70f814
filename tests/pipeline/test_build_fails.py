"""A build that cannot finish says why and leaves nothing."""

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qdm_deploy.artifacts.bundle import Bundle
from qdm_deploy.errors import CalibrationError, InputError, ResourceProblem

SMALL: dict[str, Any] = {"targets": ("onnxruntime",)}


def test_calibration_of_other_weights_is_refused(quick_build: Any, tiny: Any, tmp_path: Path) -> None:
    calibration = tiny.calibration("labels")
    other = {**calibration.provenance, "weights_sha256": "0" * 64}
    dataclasses.replace(calibration, provenance=other).save(tmp_path / "other")
    with pytest.raises(InputError, match=r"other was sampled from other weights than those of .*labels; leave"):
        quick_build(tmp_path / "x.qdm", calibration_file=tmp_path / "other", **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


@pytest.mark.parametrize(
    ("source", "change", "message"),
    [
        ("rgb", {}, r"has samples of shape \(3, 8, 12\); labels takes \(1, 10, 10\)"),
        ("labels", {"conditioning": {}}, r"has the conditioning \[\]; labels takes \['class_labels'\]"),
        ("labels", {"timestep": 1}, r"has timesteps outside 0 to 999, which labels was trained with"),
    ],
)
def test_calibration_of_another_kind_of_model_is_refused(
    quick_build: Any, tiny: Any, tmp_path: Path, source: str, change: dict[str, Any], message: str
) -> None:
    calibration = tiny.calibration(source)
    if "timestep" in change:
        change = {"timestep": calibration.timestep + change["timestep"] * 1000}
    dataclasses.replace(calibration, provenance={}, **change).save(tmp_path / "set")
    with pytest.raises(InputError, match=message):
        quick_build(tmp_path / "x.qdm", calibration_file=tmp_path / "set", **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize(
    ("name", "changes", "error", "message"),
    [
        ("labels", {"step_bins": 20}, InputError, r"20 step bins were asked for, but the calibration set only tells 8"),
        ("rgb", {"guidance": 2.0}, InputError, r"the model is unconditional, so there is nothing to guide"),
        ("variance", {"guidance": 2.0}, InputError, r"guidance needs what the model sees where nothing is asked for"),
        ("labels", {"steps": 2000}, InputError, r"2000"),
        ("labels", {"calibration_file": Path("nowhere")}, InputError, r"nowhere"),
        ("text", {}, InputError, r"text is conditioned on states .*encoder_hidden_states \[N, 77, 16\]"),
        ("text", {"conditioning_file": Path("nowhere")}, InputError, r"there is no conditioning file nowhere"),
    ],
)
def test_what_only_the_model_can_refuse_leaves_nothing(
    quick_build: Any, tmp_path: Path, name: str, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        quick_build(tmp_path / "x.qdm", name, **SMALL, **changes)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_diverges_is_refused(
    quick_build: Any, tmp_path: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import qdm_calibration.collect as collect

    # As a network whose output overflows at some step would answer.
    monkeypatch.setattr(collect, "guided_output", lambda network, x, *rest: x * float("inf"))
    with pytest.raises(CalibrationError, match=r"returned NaN or infinity at timestep \d+"):
        quick_build(tmp_path / "x.qdm", **SMALL)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stage", ["measure", "publish"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_build_leaves_nothing_and_keeps_what_it_would_replace(
    quick_build: Any,
    labels: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    error: type[BaseException],
) -> None:
    import shutil

    out, scratch = tmp_path / "bundles" / "labels.qdm", tmp_path / "scratch"
    scratch.mkdir()
    shutil.copytree(labels, out)
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))

    def interrupted(*arguments: Any, **options: Any) -> Any:
        # By now graphs and plan lie in the temporary folder.
        assert list(out.parent.glob(".*/unet/weights.bin"))
        raise error("stop")

    monkeypatch.setattr(f"qdm_deploy.building.bundle_from_checkpoint.{stage}", interrupted)
    with pytest.raises(error):
        quick_build(out, force=True, **SMALL)
    assert [path.name for path in out.parent.iterdir()] == ["labels.qdm"]
    assert list(scratch.iterdir()) == []
    assert Bundle.open(out).pipeline.name == "labels"


# What fills up first: the weights, a graph's data, or what is written at the end.
@pytest.mark.parametrize("kilobytes", [200, 900, 1700])
def test_a_full_disk_is_named_and_leaves_nothing(
    quick_build: Any, tmp_path: Path, mount: Callable[[Path, str], Path], kilobytes: int
) -> None:
    disk = mount(tmp_path / "disk", f"size={kilobytes}k")
    with pytest.raises(ResourceProblem, match=r"disk/x\.qdm.* cannot be written .*MiB are free in .*disk"):
        quick_build(disk / "x.qdm", **SMALL)
    assert list(disk.iterdir()) == []
