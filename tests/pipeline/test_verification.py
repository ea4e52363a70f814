"""Verification finds damage by hashes, and what hashes cannot find by running the self-test."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from qdm_deploy.artifacts.plan import QuantizationPlan
from qdm_deploy.artifacts.record import read_record, write_record
from qdm_deploy.errors import BundleError, InputError
from qdm_deploy.pipeline import verify

Reseal = Callable[[Path], None]
# With random weights most layers hardly matter for the output; this one was made to.
LAYER = "down_blocks.0.resnets.0.conv2"


@pytest.fixture
def copy(labels: Path, tmp_path: Path) -> Path:
    shutil.copytree(labels, tmp_path / "copy.qdm")
    return tmp_path / "copy.qdm"


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_bundle_passes_where_it_was_built(labels: Path, backend: str) -> None:
    result = verify(labels, backend)
    assert result.ok, result
    assert result.findings == ()
    (row,) = result.selftest
    assert row.name == f"self-test on {backend}"
    assert "dB at build time" in row.detail


def test_a_changed_byte_is_found_and_nothing_is_run(copy: Path) -> None:
    weights = copy / "unet" / "weights.bin"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    (copy / "extra.txt").write_text("?")
    result = verify(copy)
    assert not result.ok
    assert result.selftest == ()
    assert len(result.findings) == 2
    assert any("weights.bin has SHA-256" in finding for finding in result.findings)
    assert any("extra.txt" in finding for finding in result.findings)


def change_codes(bundle: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:  # type: ignore[type-arg]
    """Changes the weight codes of one layer in the weights file."""
    graph = onnx.load(str(bundle / "unet" / "onnxruntime.onnx"), load_external_data=False).graph
    (tensor,) = (item for item in graph.initializer if item.name == f"{LAYER}/weight_codes")
    where = {item.key: item.value for item in tensor.external_data}
    start, length = int(where["offset"]), int(where["length"])
    weights = bundle / "unet" / "weights.bin"
    content = bytearray(weights.read_bytes())
    codes = np.frombuffer(bytes(content[start : start + length]), np.int8)
    content[start : start + length] = change(codes).astype(np.int8).tobytes()
    weights.write_bytes(content)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_wrong_weights_under_right_hashes_fail_the_selftest(copy: Path, reseal: Reseal, backend: str) -> None:
    change_codes(copy, lambda codes: np.roll(codes, 1))
    reseal(copy)
    result = verify(copy, backend)
    assert result.findings == ()
    assert not result.ok
    assert "dB needed" in result.selftest[0].detail


def test_wrong_scales_in_one_graph_fail_its_selftest(copy: Path, reseal: Reseal) -> None:
    path = copy / "unet" / "onnxruntime.onnx"
    model = onnx.load(str(path), load_external_data=False)
    (scale,) = (item for item in model.graph.initializer if item.name == f"{LAYER}/scale")
    scale.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(scale) / 20, scale.name))
    path.write_bytes(model.SerializeToString())
    reseal(copy)
    assert not verify(copy, "onnxruntime").ok
    assert verify(copy, "openvino").ok


def test_a_backend_that_the_build_machine_lacked_is_run_without_a_verdict(copy: Path, reseal: Reseal) -> None:
    path = copy / "selftest" / "expected.safetensors"
    document, arrays = read_record(path, kind="qdm-selftest-expected", version=1)
    path.unlink()
    kept = {"reached_db": {"openvino": document["reached_db"]["openvino"]}}  # type: ignore[index]
    write_record(path, kind="qdm-selftest-expected", version=1, document=kept, arrays=arrays)
    reseal(copy)
    result = verify(copy, "onnxruntime")
    assert result.ok
    assert "the build machine had no onnxruntime" in result.selftest[0].detail


def test_an_unreadable_selftest_is_a_damaged_bundle(copy: Path, reseal: Reseal) -> None:
    (copy / "selftest" / "inputs.safetensors").write_bytes(b"nothing of the kind")
    reseal(copy)
    with pytest.raises(BundleError, match=r"the self-test of .*copy\.qdm cannot be read"):
        verify(copy)


def test_there_must_be_a_bundle(tmp_path: Path) -> None:
    (finding,) = verify(tmp_path / "nowhere").findings
    assert "nowhere is not a folder; give the folder of a bundle" in finding


def test_an_unknown_backend_is_refused(labels: Path) -> None:
    with pytest.raises(InputError, match="the backend 'cpu' is unknown"):
        verify(labels, "cpu")


def test_the_plan_survives_the_bundle(labels: Path) -> None:
    plan = QuantizationPlan.load(labels / "unet")
    assert all(item.weight_codes is not None and item.weight_codes.dtype == np.int8 for item in plan.quantized)
