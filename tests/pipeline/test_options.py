"""What cannot be done is refused when the options are made, with the value and what is allowed."""

from pathlib import Path
from typing import Any

import pytest

from qdm_deploy.errors import InputError
from qdm_deploy.pipeline import BuildOptions, CompareOptions, GenerateOptions
from tests.recipes import recipe_of

X = Path("x")
BAD = float("nan")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": ()}, r"no target was given; choose from onnxruntime, openvino, tensorrt"),
        ({"targets": ("onnxruntime", "tensort")}, r"unknown target 'tensort' \(did you mean tensorrt\?\)"),
        ({"targets": ("openvino",)}, r"the target onnxruntime is part of every bundle"),
        ({"targets": ("onnxruntime", "onnxruntime")}, r"a target is given twice: onnxruntime, onnxruntime"),
        (
            {"targets": ("onnxruntime",), "recipe": recipe_of(rest="bf16")},
            r"the recipe asks for a bf16 rest, which only the target tensorrt has",
        ),
        ({"targets": ("onnxruntime",), "engines": ("8.9",)}, r"engines for 8\.9 are built from the target tensorrt"),
        ({"sampler": "DDIM"}, r"unknown sampler 'DDIM' \(did you mean ddim\?\); choose one of ddpm, ddim"),
        ({"sampler": "qqq"}, r"unknown sampler 'qqq'; choose one of"),
        ({"steps": 0}, r"steps is 0; it must be from 1 to 10000"),
        ({"guidance": BAD}, r"guidance is nan; it must be from 0 to 100"),
        ({"seed": -1}, r"seed is -1; it must be from 0 to"),
        ({"seed": 2**63}, r"seed is 9223372036854775808; it must be from 0 to 4611686018427387904"),
        ({"verify_samples": 0}, r"verify samples is 0; it must be from 1 to 4096"),
        ({"verify_steps": 0}, r"verify steps is 0; it must be from 1 to 10000"),
        ({"min_psnr_db": BAD}, r"the PSNR threshold is nan; it must be from 0 to 1000"),
        ({"min_eps_sqnr_db": -3.0}, r"the SQNR threshold is -3\.0; it must be from 0 to 1000"),
        ({"min_speedup": -1.0}, r"the speed-up threshold is -1\.0; it must be from 0 to 1000"),
        ({"threads": 0}, r"threads is 0; it must be from 1 to 1024"),
    ],
)
def test_build_options(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        BuildOptions(out=X, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": "eular"}, r"unknown sampler 'eular' \(did you mean euler\?\)"),
        ({"count": 0}, r"the number of images is 0; it must be from 1 to 100000"),
        ({"steps": 10_001}, r"steps is 10001; it must be from 1 to 10000"),
        ({"batch_size": 0}, r"batch size is 0; it must be from 1 to 1024"),
        ({"seed": 2**63 - 1}, r"seed is 9223372036854775807; it must be from 0 to 9223372036854775791"),
        ({"guidance": -0.5}, r"guidance is -0\.5; it must be from 0 to 100"),
        ({"eta": 1.01}, r"eta is 1\.01; it must be from 0 to 1"),
    ],
)
def test_generate_options(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        GenerateOptions(bundle=X, out=X, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": "ddpmm"}, r"unknown sampler 'ddpmm' \(did you mean ddpm\?\)"),
        ({"samples": 5000}, r"samples is 5000; it must be from 1 to 4096"),
        ({"steps": 0}, r"steps is 0; it must be from 1 to 10000"),
        ({"seed": -7}, r"seed is -7; it must be from 0 to"),
        ({"guidance": 101}, r"guidance is 101; it must be from 0 to 100"),
    ],
)
def test_compare_options(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        CompareOptions(a=X, b=X, **changes)


def test_the_last_seeds_are_allowed() -> None:
    assert GenerateOptions(bundle=X, out=X, count=16, seed=2**63 - 17).seed == 2**63 - 17
    assert BuildOptions(out=X, seed=2**62).seed == 2**62


def test_a_calibration_set_is_saved_where_it_can_be_and_replaces_nothing(tmp_path: Path) -> None:
    taken = tmp_path / "taken.safetensors"
    taken.write_bytes(b"")
    with pytest.raises(InputError, match=r"taken\.safetensors exists; choose another file, or add --force"):
        BuildOptions(out=tmp_path / "x", save_calibration=taken)
    assert BuildOptions(out=tmp_path / "x", save_calibration=taken, force=True).save_calibration == taken
    with pytest.raises(InputError, match=r"cannot be saved as .*nowhere/c: there is no such folder"):
        BuildOptions(out=tmp_path / "x", save_calibration=tmp_path / "nowhere" / "c")
