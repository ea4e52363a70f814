"""Two runs of the same seeds side by side."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qdm_deploy.errors import BundleError, InputError
from qdm_deploy.pipeline import CompareOptions, Comparison, compare


def run(a: Path, b: Path, **changes: Any) -> Comparison:
    quick: dict[str, Any] = {
        "samples": 3, "steps": 4, "backend_a": "onnxruntime", "backend_b": "onnxruntime", "threads": 1,
    }  # fmt: skip
    return compare(CompareOptions(a=a, b=b, **{**quick, **changes}))


def test_the_same_thing_twice_is_equal(labels: Path) -> None:
    row = run(labels, labels).quality
    assert row.max_abs == 0
    # What is equal has no noise; the number stands for that.
    assert min(row.eps_sqnr_db + row.state_sqnr_db + row.psnr_db) > 150


def test_int8_is_close_to_float_but_not_equal(labels: Path, tmp_path: Path) -> None:
    result = run(labels, labels, precision_a="float", guidance=1.5, out=tmp_path / "new" / "strip.png")
    row = result.quality
    assert 18 < row.eps_sqnr_min_db < 60
    assert (row.guidance, row.samples, row.steps, len(row.psnr_db)) == (1.5, 3, 4, 3)
    assert (result.backend_a["backend"], result.backend_b["backend"]) == ("onnxruntime", "onnxruntime")
    assert result.strip == tmp_path / "new" / "strip.png"
    with Image.open(result.strip) as strip:
        assert strip.width > 3 * 96


def test_the_report_of_the_build_can_be_measured_again(labels: Path, labels_build: Any) -> None:
    built = next(row for row in labels_build.report.quality if row.target == "onnxruntime")
    options = CompareOptions(a=labels, b=labels)
    assert dataclasses.replace(options, precision_a="float").precision_a == "float"
    row = run(
        labels, labels, precision_a="float", samples=built.samples, steps=built.steps, guidance=built.guidance,
        seed=2**40, threads=None,
    ).quality  # fmt: skip
    assert row.timesteps == built.timesteps
    assert row.eps_sqnr_mean_db == pytest.approx(built.eps_sqnr_mean_db, abs=1.5)


def test_an_existing_strip_is_kept(labels: Path, tmp_path: Path) -> None:
    strip = tmp_path / "strip.png"
    strip.write_bytes(b"mine")
    with pytest.raises(InputError, match=r"strip\.png exists; choose another file, or add --force"):
        run(labels, labels, out=strip)
    assert strip.read_bytes() == b"mine"
    run(labels, labels, out=strip, force=True)
    assert strip.read_bytes() != b"mine"


def test_models_of_another_kind_are_refused(labels: Path, rgb: Path) -> None:
    with pytest.raises(InputError, match=r"makes \(1, 10, 10\) and .* \(3, 8, 12\), or they are conditioned on other"):
        run(labels, rgb)


def test_another_scheduler_is_refused(labels: Path, tmp_path: Path, reseal: Any) -> None:
    import json
    import shutil

    other = tmp_path / "other.qdm"
    shutil.copytree(labels, other)
    config = other / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_bytes()), "beta_end": 0.01}))
    reseal(other)
    with pytest.raises(InputError, match=r"other\.qdm have different schedulers"):
        run(labels, other)


def test_a_missing_graph_is_named(labels: Path, rgb: Path) -> None:
    with pytest.raises(BundleError, match="no graph for 'float'"):
        run(rgb, rgb, precision_b="float")
